"""The engines with torchreid's models, samplers, data managers and schedulers."""

import copy
import json
import math
from functools import partial

import pytest
import torch
import torchreid
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.distances import LpDistance
from torch.utils.data import BatchSampler, DataLoader
from toy_data import Manager, make_image_manager

from pml_drsl import DRSLoss
from torchreid_ext import get_default_config, networks
from torchreid_ext.engine import engines
from torchreid_ext.evaluation.extraction import extract

ZOO = list(vars(torchreid.models)["__model_factory"])

# Where the network's last layers ask for one size.
SIZES = {"mudeep": (256, 128), "hacnn": (160, 64), "inceptionv4": (128, 128), "inceptionresnetv2": (128, 128)}


def make_engine(model, engine=engines.ImageDRSLEngine, scheduler=None, lr=1e-3, **kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return engine(kwargs.pop("datamanager", None) or Manager(), model, optimizer, scheduler=scheduler, **kwargs)


def build(name="osnet_x0_25", num_classes=2, loss="triplet"):
    return torchreid.models.build_model(name, num_classes, loss=loss, pretrained=False, use_gpu=False)


def batch(height=64, width=32, size=4):
    return {"img": torch.randn(size, 3, height, width), "pid": torch.arange(size) // 2}


# A step without a neck for one half of the networks, with a neck for the other; features with a neck for all.
@pytest.mark.parametrize("part", range(7))
def test_every_model_of_the_zoo_takes_a_step_and_has_a_neck(part):
    for number, name in enumerate(ZOO[part::7]):
        torch.manual_seed(0)
        model = build(name)
        data = batch(*SIZES.get(name, (64, 32)))
        if number % 2:
            networks.add_neck(model)
        networks.set_memory_format(model, "auto", *data["img"].shape[2:])
        engine = make_engine(model)
        engine.set_model_mode("train")
        before = {key: value.clone() for key, value in model.named_parameters()}
        summary = engine.forward_backward(data)
        assert set(summary) >= {"loss_m", "loss_x", "acc", "retrieval_error", "num_queries"}, name
        assert all(math.isfinite(value) for value in summary.values()), name
        assert any(not torch.equal(value, before[key]) for key, value in model.named_parameters()), name
        if not number % 2:
            networks.add_neck(model)
        engine.set_model_mode("eval")
        sizes = [module.in_features for module in model.modules() if isinstance(module, networks.NeckClassifier)]
        assert engine.extract_features(data["img"]).shape == (4, sum(sizes)), name
        assert networks.feature_sizes(model, *data["img"].shape[2:]) == sizes, name


@pytest.mark.parametrize(("section", "engine"), [("drsl", "ImageDRSLEngine"), ("pml", "ImagePMLEngine")])
def test_an_engine_of_a_script_has_the_weights_of_a_configuration(section, engine):
    made = make_engine(build(), getattr(engines, engine), criterion=DRSLoss())
    keys = get_default_config().loss[section]
    assert (made.weight_m, made.weight_x) == (keys.weight_m, keys.weight_x)


@pytest.mark.parametrize("name", ["osnet_x0_25", "pcb_p4"])
@pytest.mark.parametrize("loss", ["Softmax", "Triplet"])
def test_a_step_is_that_of_torchreids_own_engine(loss, name):
    torch.manual_seed(0)
    model, data, steps = build(name, loss=loss.lower()), batch(), []
    host, weights = getattr(torchreid.engine, f"Image{loss}Engine"), {}
    ours = partial(engines.ImagePMLEngine, weight_m=0)
    if loss == "Triplet":
        weights = {"weight_t": 2, "weight_x": 0.5}
        ours = partial(engines.ImagePMLEngine, criterion=torchreid.losses.TripletLoss(), weight_m=2, weight_x=0.5)
    for kind, options in ((host, weights), (ours, {})):
        engine = make_engine(copy.deepcopy(model), kind, use_gpu=False, **options)
        engine.set_model_mode("train")
        torch.manual_seed(1)
        engine.forward_backward(data)
        steps.append(engine.model.state_dict())
    assert all(
        not torch.equal(weight, model.get_parameter(key)) for key, weight in steps[0].items() if "classifier" in key
    )
    torch.testing.assert_close(steps[1], steps[0])


def test_heads_are_averaged():
    heads = torch.randn(4, 6, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    logits = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)

    class TwoHeads(torch.nn.Linear):
        def forward(self, images):
            nothing = 0 * self.weight.sum()  # The optimizer needs a gradient.
            return [y + nothing for y in logits], [head + nothing for head in heads]

    data = batch()
    summary = make_engine(TwoHeads(1, 1), weight_m=2, weight_x=3).forward_backward(data)
    loss_m = sum(DRSLoss()(head, data["pid"]) for head in heads) / 2
    loss_x = sum(torch.nn.functional.cross_entropy(y, data["pid"], label_smoothing=0.1) for y in logits) / 2
    assert summary["loss_m"] == pytest.approx(loss_m.item())
    assert summary["loss_x"] == pytest.approx(loss_x.item())
    torch.testing.assert_close(heads[0].grad, torch.autograd.grad(2 * loss_m, heads[0])[0])
    torch.testing.assert_close(logits[1].grad, torch.autograd.grad(3 * loss_x, logits[1])[0])


def test_cross_entropy_is_torchreids():
    logits, pids = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 3])
    engine = make_engine(build())
    wanted = torchreid.losses.CrossEntropyLoss(num_classes=4, use_gpu=False)(logits, pids)
    torch.testing.assert_close(engine.cross_entropy(logits, pids), wanted)


@pytest.mark.parametrize(("name", "loss"), [("osnet_x0_25", "softmax"), ("hacnn", "drsl"), ("pcb_p4", "softmax")])
def test_a_model_built_for_another_loss_is_refused(name, loss):
    with pytest.raises(ValueError, match=f"built with loss='{loss}'.*loss='triplet'"):
        make_engine(build(name, loss=loss))


# One head, two, which are no pair of logits and features, and four.
@pytest.mark.parametrize("name", ["osnet_x0_25", "hacnn", "pcb_p4"])
def test_without_the_metric_loss_a_softmax_model_will_do(name):
    model = build(name, loss="softmax")
    summary = make_engine(model, weight_m=0).forward_backward(batch(*SIZES.get(name, (64, 32))))
    assert set(summary) == {"loss_x", "acc"}
    assert all(weight.grad is not None for key, weight in model.named_parameters() if "classifier" in key)


def test_a_loss_that_has_no_statistics_may_be_asked_for_them():
    without = pml_losses.ContrastiveLoss(collect_stats=True)
    both = pml_losses.MultipleLosses([without, DRSLoss(collect_stats=True)])
    for criterion, statistics in ((without, set()), (both, {"retrieval_error", "sort_error", "num_queries"})):
        summary = make_engine(build(), criterion=criterion).forward_backward(batch())
        assert set(summary) == {"loss_m", "loss_x", "acc"} | statistics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_m": -1}, "weight_m and weight_x .* got -1 and 1"),
        ({"weight_m": 0, "weight_x": 0}, "not both 0"),
        ({"criterion": "drsl"}, "criterion must be a loss .* 'drsl'"),
        ({"miner": "hard"}, "miner must be a miner .* 'hard'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_engine(build(), **arguments)


def test_too_few_classes_and_wrong_outputs_are_refused():
    with pytest.raises(ValueError, match=r"logits have shape \(4, 1\), but there are 2 training identities"):
        make_engine(build(num_classes=1)).forward_backward(batch())
    assert "loss_m" in make_engine(build(num_classes=1), weight_x=0).forward_backward(batch())
    with pytest.raises(ValueError, match="the model must return"):
        make_engine(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * 32 * 3, 2))).forward_backward(batch())


def test_a_loss_that_is_not_finite_stops_the_run():
    engine = make_engine(build())
    engine.batch_idx = 6
    data = batch()
    data["img"][0] = math.inf
    before = [p.clone() for p in engine.model.parameters()]
    with pytest.raises(FloatingPointError, match=r"epoch 1, batch 7.*learning rate, now 0\.001"):
        engine.forward_backward(data)
    assert all(torch.equal(*pair) for pair in zip(before, engine.model.parameters(), strict=True))


# With real data managers, over a few epochs.


@pytest.mark.parametrize(
    ("sampler", "scheduled"),
    [
        ("RandomIdentitySampler", True),
        ("RandomSampler", False),
    ],
)
def test_trains_tests_saves_and_resumes(tmp_path, sampler, scheduled):
    manager = make_image_manager(tmp_path, train_sampler=sampler, num_cams=2)
    model = build(num_classes=manager.num_train_pids)
    optimizer = torchreid.optim.build_optimizer(model)
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, "multi_step", [1]) if scheduled else None
    engine = torchreid.engine.ImageDRSLEngine(manager, model, optimizer, scheduler=scheduler)
    log = tmp_path / "log"
    results = engine.run(str(log), max_epoch=2, print_freq=1, eval_freq=1)
    assert 0 < results["toy"].mAP <= 1
    metrics = json.loads((log / "metrics.json").read_text())
    assert metrics["toy"]["mAP"] == results["toy"].mAP
    assert list(log.glob("events.out.tfevents*"))
    for epoch in (1, 2):
        path = log / "model" / f"model.pth.tar-{epoch}"
        state = torch.load(path, weights_only=True)
        assert state["epoch"] == epoch
    twin = build(num_classes=manager.num_train_pids)
    twin_optimizer = torchreid.optim.build_optimizer(twin)
    twin_scheduler = torchreid.optim.build_lr_scheduler(twin_optimizer, "multi_step", [1]) if scheduled else None
    twin_engine = torchreid.engine.ImageDRSLEngine(manager, twin, twin_optimizer, scheduler=twin_scheduler)
    assert twin_engine.resume(str(path)) == 2
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    assert twin_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    # The host's own function reads it too.
    assert torchreid.utils.resume_from_checkpoint(str(path), twin, twin_optimizer, twin_scheduler) == 2


def test_testing_leaves_the_training_as_it_is(tmp_path):
    weights = []
    for eval_freq in (-1, 1):
        torch.manual_seed(0)
        torchreid.utils.set_random_seed(3)
        manager = make_image_manager(tmp_path, transforms=["random_flip", "random_crop"])
        model = build(num_classes=manager.num_train_pids)
        make_engine(model, datamanager=manager).run(str(tmp_path / "log"), max_epoch=3, eval_freq=eval_freq)
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_results_are_torchreids(tmp_path):
    manager = make_image_manager(tmp_path)
    engine = make_engine(build(num_classes=manager.num_train_pids), datamanager=manager)
    result = engine.test(dist_metric="cosine", ranks=range(1, 4))["toy"]
    query, gallery = (extract(engine, manager.test_loader["toy"][split]) for split in ("query", "gallery"))
    cmc, mean_ap = torchreid.metrics.evaluate_rank(
        torchreid.metrics.compute_distance_matrix(query.features, gallery.features, "cosine").numpy(),
        query.pids,
        gallery.pids,
        query.camids,
        gallery.camids,
    )
    assert result.mAP == pytest.approx(mean_ap, abs=1e-6)
    assert result.rank(1) == pytest.approx(cmc[0], abs=1e-6)


def test_positives_by_chance_matter_to_losses_that_compare_images(tmp_path, recwarn):
    manager = make_image_manager(tmp_path, train_sampler="RandomSampler")
    with pytest.warns(UserWarning, match="TripletMarginLoss needs several .* which RandomSampler draws by"):
        make_engine(build(num_classes=6), datamanager=manager, criterion=pml_losses.TripletMarginLoss())
    recwarn.clear()
    model, arcface = build(num_classes=6), pml_losses.ArcFaceLoss(6, 512)
    optimizer = torch.optim.SGD([*model.parameters(), *arcface.parameters()], lr=0.1)
    engines.ImagePMLEngine(manager, model, optimizer, arcface)
    make_engine(model, datamanager=manager, weight_m=0)

    # Another batch sampler than the default one groups as it likes.
    class Own(BatchSampler):
        pass

    own = Own(manager.train_loader.sampler, 8, drop_last=True)
    manager.train_loader = DataLoader(manager.train_loader.dataset, batch_sampler=own)
    make_engine(model, datamanager=manager)
    assert not [warning for warning in recwarn if "by chance" in str(warning.message)]


@pytest.mark.parametrize("distance, options, told", [
    (None, {}, True),
    (None, {"dist_metric": "cosine"}, False),
    (None, {"normalize_feature": True}, False),
    (LpDistance(normalize_embeddings=False), {}, False),
])  # fmt: skip
def test_a_test_by_another_distance_than_the_loss_has_is_told(tmp_path, recwarn, distance, options, told):
    manager, criterion = make_image_manager(tmp_path), DRSLoss(distance=distance)
    make_engine(build(num_classes=6), datamanager=manager, criterion=criterion).run(
        max_epoch=0, save_dir=str(tmp_path / "log"), **options
    )
    assert ["unit norm" in str(warning.message) for warning in recwarn].count(True) == told
