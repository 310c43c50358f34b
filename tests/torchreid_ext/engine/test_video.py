"""Video: how every engine samples and pools tracklets."""

import glob
import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
import torchreid
from PIL import Image
from toy_data import draw_tracklets

import torchreid_ext
from pml_drsl.checks import InputError
from torchreid_ext import build_engine, config, get_default_config
from torchreid_ext.data.samplers import steps_per_epoch
from torchreid_ext.engine.engines import VideoPMLEngine
from torchreid_ext.engine.step import collate_tracklets


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return draw_tracklets(tmp_path_factory.mktemp("video"))


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


@pytest.mark.parametrize(("loss", "sample_method"), [("softmax", "random"), ("triplet", "evenly"), ("drsl", "all")])
def test_every_engine_trains_and_every_sampling(root, tmp_path, loss, sample_method):
    engine = built(root, loss, sample_method, pooling="max", **{"test.batch_size": 7})
    (loader, _) = engine.test_loader["synthetic_tracklets"].values()
    # A whole tracklet may have a thousand frames.
    assert [len(batch) for batch in loader.batch_sampler] == ([1] * 18 if sample_method == "all" else [7, 7, 4])
    assert type(engine).__name__ == f"Video{'DRSL' if loss == 'drsl' else 'PML'}Engine"
    results = engine.run(str(tmp_path), max_epoch=1)
    assert 0 < results["synthetic_tracklets"].mAP <= 1
    assert json.loads((tmp_path / "metrics.json").read_text())["synthetic_tracklets"]["num_query"] == 18


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_all_frames_of_each_tracklet_are_pooled_and_no_others(root, pooling):
    engine = built(root, "drsl", "all", pooling)
    engine.set_model_mode("eval")
    dataset = engine.datamanager.test_loader["synthetic_tracklets"]["query"].dataset
    batch = engine.test_loader["synthetic_tracklets"]["query"].collate_fn([*dataset])
    assert batch["img"].shape[:2] == (18, max(len(item[0]) for item in dataset.query))
    with torch.no_grad():
        features = engine.extract_features(batch["img"])
        for index, found in enumerate(features):
            frames = engine.model(dataset[index]["img"])
            assert len(frames) == len(dataset.query[index][0])
            torch.testing.assert_close(found, frames.mean(0) if pooling == "avg" else frames.max(0).values)


def test_a_collate_fn_of_the_users_own_is_kept(root):
    engine = built(root, "softmax", "all")
    manager, seen = engine.datamanager, []

    def own(items):
        seen.append(len(items))
        return collate_tracklets(items)

    manager.train_loader.collate_fn = own
    engine = VideoPMLEngine(manager, engine.model, engine.optimizer, weight_m=0)
    next(iter(engine.train_loader))
    assert seen == [8]


def test_training_on_tracklets_of_different_lengths(root):
    engine = built(root, "pml", "all")
    items = [{"img": torch.full((n, 3, 2, 2), float(n)), "pid": n, "camid": 10 * n} for n in (2, 4, 1)]
    batch = collate_tracklets(items)
    images, pids = engine.parse_data_for_train(batch)
    assert images[:, 0, 0, 0].tolist() == [2, 2, 4, 4, 4, 4, 1]
    assert pids.tolist() == [2, 2, 4, 4, 4, 4, 1]
    assert engine.repeated(batch["camid"], batch["img"]).tolist() == [20, 20, 40, 40, 40, 40, 10]


def test_validation_identities_are_held_out_of_tracklets_too(root):
    engine = built(root, "drsl", "evenly", **{"data.validation": 0.5, "data.targets": "nowhere"})
    trained, tested = engine.train_loader.dataset.train, engine.datamanager.test_dataset["validation"]
    people = [{Path(item[0][0]).parent.name for item in items} for items in (trained, tested["gallery"])]
    assert [len(each) for each in people] == [3, 3] and not people[0] & people[1]
    # Two tracklets of each person by each of three cameras.
    assert [len(items) for items in (trained, tested["query"], tested["gallery"])] == [18, 9, 18]
    assert 0 < engine.test()["validation"].mAP <= 1


def test_frames_are_in_the_order_of_their_names_whatever_the_file_system(tmp_path, monkeypatch):
    for camera, person, frame in itertools.product("ab", range(4), range(3)):
        path = tmp_path / "prid2011" / "prid_2011" / "multi_shot" / f"cam_{camera}" / f"p{person}" / f"{frame:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16)).save(path)
    splits = [{"train": ["p0", "p1"], "test": ["p2", "p3"]}]
    (tmp_path / "prid2011" / "splits_prid2011.json").write_text(json.dumps(splits))
    listed = glob.glob
    monkeypatch.setattr(glob, "glob", lambda pattern: sorted(listed(pattern), reverse=True))
    cfg = get_default_config()
    words = (
        "data.type video data.sources prid2011 data.targets prid2011 data.workers 0 use_gpu False train.batch_size 4"
    )
    cfg.merge_from_list([*words.split(), "data.root", str(tmp_path)])
    manager = config.build_datamanager(cfg)
    loaders = [manager.train_loader, *manager.test_loader["prid2011"].values()]
    items = [item for loader in loaders for item in loader.dataset.data] + manager.test_dataset["prid2011"]["query"]
    assert len(items) == 4 + 2 + 2 + 2
    assert {tuple(Path(path).name for path in item[0]) for item in items} == {("0000.png", "0001.png", "0002.png")}


def test_images_that_a_configuration_describes_are_no_tracklets(root):
    with pytest.raises(InputError, match=r"datasets\.mine describes images, .*register_video_dataset"):
        built(root, "drsl", "evenly", **{"datasets.mine.folder": "photos", "data.targets": "mine"})
    built(root, "drsl", "evenly", **{"datasets.mine.folder": "photos"})


@pytest.mark.parametrize(("sample_method", "frames"), [("evenly", 2), ("all", 1), ("evenly", 1)])
def test_frames_of_a_tracklet_are_positives_of_each_other(root, sample_method, frames):
    changes = {"sampler.train_sampler": "RandomSampler", "video.seq_len": frames}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built(root, "drsl", sample_method, **changes)
    warned = any("several images of an identity" in str(warning.message) for warning in caught)
    assert warned == (sample_method != "all" and frames == 1)


def test_a_wrong_pooling_is_refused(root):
    engine = built(root, "drsl", "evenly")
    with pytest.raises(ValueError, match="pooling_method must be 'avg' or 'max', got 'min'"):
        torchreid_ext.VideoDRSLEngine(engine.datamanager, engine.model, engine.optimizer, pooling_method="min")
