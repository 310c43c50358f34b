"""Video: how every engine samples and pools tracklets."""

import json

import pytest
import torch
import torchreid
from toy_data import draw_tracklets

import torchreid_ext
from torchreid_ext import build_engine, config, get_default_config
from torchreid_ext.data.samplers import steps_per_epoch
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
    engine = built(root, "drsl", "evenly")
    with pytest.raises(ValueError, match="pooling_method must be 'avg' or 'max', got 'min'"):
        torchreid_ext.VideoDRSLEngine(engine.datamanager, engine.model, engine.optimizer, pooling_method="min")
