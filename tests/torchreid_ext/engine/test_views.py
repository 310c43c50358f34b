"""Several augmented views of each image in a batch: torchreid's ``data.k_tfm``."""

import pytest
import torch
from pytorch_metric_learning import miners
from shared_training import Network
from toy_data import make_image_manager, register_toys

from pml_drsl import DRSLoss
from torchreid_ext import build_engine, config, get_default_config
from torchreid_ext.engine import engines
from torchreid_ext.runtime.generators import seed_everything

ENGINES = {
    "softmax": (engines.ImagePMLEngine, {"weight_m": 0}),
    "drsl": (engines.ImageDRSLEngine, {}),
    "miner and cameras": (engines.ImageDRSLEngine, {"miner": miners.MultiSimilarityMiner(), "cross_camera": True}),
}


def make_engine(folder, name, views):
    seed_everything(3)
    manager = make_image_manager(folder, k_tfm=views, transforms=["random_flip", "random_crop"])
    kind, arguments = ENGINES[name]
    model = Network(torch.float32, "logits" if name == "softmax" else "both")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return kind(manager, model, optimizer=optimizer, use_gpu=False, **arguments)


@pytest.mark.parametrize("name", ["softmax", "miner and cameras"])
def test_every_image_engine_trains_on_all_views(tmp_path, name):
    engine = make_engine(tmp_path, name, views=3)
    before, seen = engine.model.classifier.weight.clone(), []
    engine.model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    results = engine.run(str(tmp_path / "log"), max_epoch=1, channels_last=False)  # which takes no image to try it
    assert 0 < results["toy"].mAP <= 1
    assert not torch.equal(engine.model.classifier.weight, before)
    # Three batches of eight images in three views; then the test, without views.
    assert seen[:3] == [24] * 3 and sum(seen[3:]) == len(engine.datamanager.test_dataset["toy"]["query"]) * 2


@pytest.mark.parametrize("cross_camera", [False, True])
def test_each_view_has_the_identity_and_the_camera_of_its_image(tmp_path, cross_camera):
    engine = make_engine(tmp_path, "drsl", views=2)
    engine.cross_camera = cross_camera
    engine.set_model_mode("train")
    data = next(iter(engine.train_loader))
    assert isinstance(data["img"], list) and not torch.equal(*data["img"])
    batch = engine.training_batch(data)
    rows = list(zip(batch.images, batch.pids.tolist(), batch.camids.tolist(), strict=True))
    wanted = [
        (view[index], int(data["pid"][index]), int(data["camid"][index])) for index in range(8) for view in data["img"]
    ]
    assert [row[1:] for row in rows] == [row[1:] for row in wanted]
    assert all(torch.equal(row[0], other[0]) for row, other in zip(rows, wanted, strict=True))
    # Other views of an image are positives of it, unless positives must be of another camera.
    logits, features = engine.model(batch.images)
    x = features.detach()
    pairs = None
    if cross_camera:
        indices = range(16)
        same = [[batch.pids[i] == batch.pids[j] for j in indices] for i in indices]
        positives = [(i, j) for i in indices for j in indices if same[i][j] and batch.camids[i] != batch.camids[j]]
        negatives = [(i, j) for i in indices for j in indices if not same[i][j]]
        pairs = tuple(torch.tensor(part) for found in (positives, negatives) for part in zip(*found, strict=True))
    _, summary = engine.compute_losses((logits, features), batch)
    assert summary["loss_m"] == pytest.approx(DRSLoss()(x, batch.pids, pairs).item(), rel=1e-5)


def test_the_evaluation_does_not_depend_on_the_number_of_views(tmp_path):
    one, three = (make_engine(tmp_path, "drsl", views).test()["toy"] for views in (1, 3))
    assert (one.mAP, one.rank(1)) == (three.mAP, three.rank(1))


def test_two_views_are_positives_that_no_chance_brings(tmp_path, recwarn):
    manager = make_image_manager(tmp_path, k_tfm=2, train_sampler="RandomSampler")
    model = Network(torch.float32)
    engines.ImageDRSLEngine(manager, model, torch.optim.SGD(model.parameters(), lr=0.1), use_gpu=False)
    assert not [warning for warning in recwarn if "by chance" in str(warning.message)]


def configured(folder, *words):
    cfg = get_default_config()
    values = {"model.name": "osnet_x0_25", "model.pretrained": False, "use_gpu": False, "data.workers": 0}
    values |= {"data.height": 64, "data.width": 32, "data.root": str(folder), "train.batch_size": 8}
    values |= {"sampler.train_sampler": "RandomIdentitySampler", "loss.name": "drsl"}
    cfg.merge_from_list([*(word for item in values.items() for word in item), *words])
    return cfg


@pytest.mark.parametrize("sources", [["toy"], ["toy", "toy"]])
def test_by_configuration(tmp_path, sources):
    register_toys()
    cfg = configured(
        tmp_path, "data.k_tfm", 2, "data.sources", sources, "data.targets", ["toy"], "data.allow_overlap", True
    )
    manager = config.build_datamanager(cfg)
    model = config.build_model(cfg, manager.num_train_pids)
    engine = build_engine(cfg, manager, model, config.build_optimizer(cfg, model), None)
    assert len(engine.training_batch(next(iter(engine.train_loader))).images) == 16


def test_views_of_tracklets_are_refused(tmp_path):
    cfg = configured(tmp_path, "data.type", "video", "data.k_tfm", 2)
    with pytest.raises(ValueError, match=r"data\.k_tfm must be 1 for video, .*got 2"):
        config.build_datamanager(cfg)
