"""Video: the drawn tracklets, read as MARS is, and how every video engine samples and pools tracklets."""

import hashlib
import json

import pytest
import torch
import torchreid

import torchreid_ext
from torchreid_ext import build_engine, config, get_default_config
from torchreid_ext.data import synthetic
from torchreid_ext.data.samplers import steps_per_epoch
from torchreid_ext.data.synthetic import SyntheticTracklets
from torchreid_ext.engine.step import collate_tracklets


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twelve identities in place of 64."""
    folder = tmp_path_factory.mktemp("video")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "TRACKED", {"train": range(1, 7), "test": range(7, 13)})
        SyntheticTracklets.draw(folder / "synthetic_tracklets")
    return folder


def read(root):
    return SyntheticTracklets(str(root), transform=lambda image: image, verbose=False)


def test_splits(root):
    data = read(root)
    parts = {"train": (6, 36), "query": (6, 18), "gallery": (6, 18)}
    for part, (people, tracklets) in parts.items():
        rows = getattr(data, part)
        assert (len({row[1] for row in rows}), len(rows)) == (people, tracklets)
        for paths, _, camid, _ in rows:
            names = [path.rsplit("/", 1)[1] for path in paths]
            # One person, one camera, one tracklet, frames in order from the first.
            assert {name[:12] for name in names} == {names[0][:12]} and int(names[0][5]) == camid + 1
            assert [int(name[12:15]) for name in names] == list(range(1, len(names) + 1))
            assert 3 <= len(names) <= 6
    assert len({len(row[0]) for row in data.train}) > 1
    assert {row[1] for row in data.query} == {row[1] for row in data.gallery}
    assert not {row[0] for row in data.query} & {row[0] for row in data.gallery}
    for _, pid, camid, _ in data.query:
        assert any(other == pid and at != camid for _, other, at, _ in data.gallery)


def test_torchreids_own_reader_finds_the_same(root):
    link = root / "mars"
    link.symlink_to(root / "synthetic_tracklets")
    theirs = torchreid.data.datasets.init_video_dataset("mars", root=str(root), transform=1, verbose=False)
    ours = read(root)
    for part in ("train", "query", "gallery"):
        rows = [[([p.rsplit("/", 1)[1] for p in row[0]], *row[1:]) for row in getattr(d, part)] for d in (ours, theirs)]
        assert rows[0] == rows[1]


def test_the_seed_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "TRACKED", {"train": range(1, 2), "test": range(2, 3)})
    pixels = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        SyntheticTracklets.draw(tmp_path / name, seed)
        files = sorted((tmp_path / name).rglob("*.jpg"))
        pixels.append({hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
        assert len(pixels[-1]) == len(files)
    assert pixels[0] == pixels[1] and not pixels[0] & pixels[2]
    with pytest.raises(ValueError, match="seed=-1 must be 0 or more"):
        SyntheticTracklets.draw(tmp_path / "d", -1)


def test_another_recipe_is_refused(root):
    with pytest.raises(ValueError, match=r"'seed': 0.*'seed': 7.*delete it"):
        SyntheticTracklets(str(root), seed=7, transform=1)


def built(root, loss, sample_method, pooling="avg", **changes):
    cfg = get_default_config()
    values = {"data.type": "video", "data.root": str(root), "data.height": 64, "data.width": 32, "data.workers": 0}
    values |= {"data.sources": "synthetic_tracklets", "data.targets": "synthetic_tracklets", "use_gpu": False}
    values |= {"video.seq_len": 3, "video.sample_method": sample_method, "video.pooling_method": pooling}
    values |= {"sampler.train_sampler": "RandomIdentitySampler", "sampler.num_instances": 4, "train.batch_size": 8}
    values |= {"model.name": "osnet_x0_25", "model.pretrained": False, "loss.name": loss, **changes}
    cfg.merge_from_list([part for pair in values.items() for part in pair])
    torchreid.utils.set_random_seed(0)
    manager = config.build_datamanager(cfg)
    model = config.build_model(cfg, manager.num_train_pids)
    criterion = config.build_criterion(cfg, model, manager.num_train_pids, steps_per_epoch(manager))
    return build_engine(cfg, manager, model, config.build_optimizer(cfg, model, criterion), None, criterion)


@pytest.mark.parametrize(
    ("loss", "sample_method"),
    [("softmax", "all"), ("softmax", "random"), ("triplet", "evenly"), ("drsl", "all"), ("pml", "random")],
)
def test_every_engine_trains_and_every_sampling(root, tmp_path, loss, sample_method):
    engine = built(root, loss, sample_method, pooling="max", **{"test.batch_size": 7})
    assert type(engine).__name__ == f"Video{ {'drsl': 'DRSL', 'pml': 'PML'}.get(loss, loss.title()) }Engine"
    results = engine.run(str(tmp_path), max_epoch=1)
    assert 0 < results["synthetic_tracklets"].mAP <= 1
    assert json.loads((tmp_path / "metrics.json").read_text())["synthetic_tracklets"]["num_query"] == 18


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_all_frames_of_each_tracklet_are_pooled_and_no_others(root, pooling):
    engine = built(root, "drsl", "all", pooling, **{"test.batch_size": 18})
    engine.set_model_mode("eval")
    dataset = engine.datamanager.test_loader["synthetic_tracklets"]["query"].dataset
    (batch,) = engine.test_loader["synthetic_tracklets"]["query"]
    assert batch["img"].shape[:2] == (18, max(len(item[0]) for item in dataset.query))
    with torch.no_grad():
        features = engine.extract_features(batch["img"])
        for index, found in enumerate(features):
            frames = engine.model(dataset[index]["img"])
            assert len(frames) == len(dataset.query[index][0])
            torch.testing.assert_close(found, frames.mean(0) if pooling == "avg" else frames.max(0).values)


def test_training_on_tracklets_of_different_lengths(root):
    engine = built(root, "pml", "all")
    items = [{"img": torch.full((n, 3, 2, 2), float(n)), "pid": n, "camid": 10 * n} for n in (2, 4, 1)]
    batch = collate_tracklets(items)
    images, pids = engine.parse_data_for_train(batch)
    assert images[:, 0, 0, 0].tolist() == [2, 2, 4, 4, 4, 4, 1]
    assert pids.tolist() == [2, 2, 4, 4, 4, 4, 1]
    assert engine.repeated(batch["camid"], batch["img"]).tolist() == [20, 20, 40, 40, 40, 40, 10]


def test_a_wrong_pooling_is_refused(root):
    with pytest.raises(ValueError, match=r"video\.pooling_method must be one of avg, max, got 'min'"):
        built(root, "drsl", "evenly", "min")
    engine = built(root, "drsl", "evenly")
    with pytest.raises(ValueError, match="pooling_method must be 'avg' or 'max', got 'min'"):
        torchreid_ext.VideoDRSLEngine(engine.datamanager, engine.model, engine.optimizer, pooling_method="min")
