"""Losses, miners, reducers and distances by name, from YAML to a trained network."""

import math

import pytest
import pytorch_metric_learning.losses
import torch
import yaml
from pytorch_metric_learning import distances, losses, miners, reducers
from shared_training import Network
from toy_data import make_image_manager

import pml_drsl.miners
from pml_drsl import DRSLoss
from pml_drsl.checks import InputError
from pml_drsl.miners import NegativeBudgetMiner
from pml_drsl.reducers import PerQueryReducer
from pml_drsl.wrappers import CrossBatchMemory
from torchreid_ext import config, get_default_config
from torchreid_ext.data.samplers import steps_per_epoch
from torchreid_ext.engine import criteria, engines

EXPORTED = sorted(name for name, value in vars(pytorch_metric_learning.losses).items() if isinstance(value, type))
TRAINED = sorted(set(EXPORTED) - set(criteria.NOT_TRAINED) | {"DRSLoss"})
# What a loss has no default for.
KWARGS = {"RankedListLoss": {"margin": 0.4, "Tn": 10}}
HEIGHT_WIDTH = {"hacnn": (160, 64)}


def configured(tmp_path, loss, model="osnet_x0_25", data=None):
    """A config read from YAML; ``loss`` is its section of that name."""
    height, width = HEIGHT_WIDTH.get(model, (64, 32))
    path = tmp_path / "config.yaml"
    values = {
        "model": {"name": model, "pretrained": False},
        "data": {"height": height, "width": width},
        "train": {"lr": 0.001, "max_epoch": 1},
        "use_gpu": False,
        "loss": loss,
    }
    path.write_text(yaml.safe_dump(values))
    cfg = get_default_config()
    cfg.merge_from_file(path)
    return cfg


def built(cfg, manager):
    torch.manual_seed(0)
    model = config.build_model(cfg, manager.num_train_pids)
    criterion = config.build_criterion(cfg, model, manager.num_train_pids, steps_per_epoch(manager))
    optimizer = config.build_optimizer(cfg, model, criterion)
    scheduler = config.build_scheduler(cfg, optimizer)
    return config.build_engine(cfg, manager, model, optimizer, scheduler, criterion)


def criterion_of(cfg, num_classes=3):
    return config.build_criterion(cfg, config.build_model(cfg, num_classes), num_classes)


def test_every_loss_trains_by_yaml(tmp_path, monkeypatch):
    # What network gives the features makes no difference.
    monkeypatch.setattr(config, "build_model", lambda *_: Network(torch.float32))
    manager = make_image_manager(tmp_path)
    for name in TRAINED:
        cfg = configured(
            tmp_path, {"name": "pml", "pml": {"loss": name, "kwargs": KWARGS.get(name, {}), "weight_x": 0.0}}
        )
        engine = built(cfg, manager)
        weights = {key: value.clone() for key, value in engine.criterion.named_parameters()}
        before = engine.model.stem.weight.clone()
        engine.set_model_mode("train")
        assert math.isfinite(engine.forward_backward(next(iter(engine.train_loader)))["loss_m"]), name
        assert not torch.equal(engine.model.stem.weight, before), name
        for key, value in engine.criterion.named_parameters():
            assert not torch.equal(value, weights[key]), f"{key} of {name} was not trained"


def test_what_is_no_loss_is_refused_with_the_reason():
    for name in criteria.NOT_TRAINED:
        assert any(hasattr(module, name) for module in (losses, miners, reducers, pml_drsl.miners))
        with pytest.raises(ValueError, match=rf"loss\.pml\.loss: {name} cannot be trained with: "):
            criteria.build("loss.pml.loss", {"name": name}, criteria.TABLES["loss"])
    with pytest.raises(InputError, match=r"loss\.drsl\.miner: name takes the name of one class, got \['a'\]"):
        criteria.named("loss.drsl.miner", ["a"], criteria.TABLES["miner"])


def test_every_miner_and_reducer_that_a_config_can_name_gives_a_loss():
    x, labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) // 4
    needed = {"NegativeBudgetMiner": {"negatives_per_positive": 2}, "ThresholdReducer": {"low": 0.1}}
    needed["MultipleReducers"] = {"reducers": {"sort_loss": {"name": "SumReducer"}}}
    for kind in ("miner", "reducer"):
        for name in criteria.TABLES[kind]:
            part = criteria.build(kind, {"name": name, **needed.get(name, {})}, criteria.TABLES[kind])
            loss = DRSLoss()(x, labels, part(x, labels)) if kind == "miner" else DRSLoss(reducer=part)(x, labels)
            assert isinstance(loss, torch.Tensor) and loss.isfinite(), name


def test_weights_are_as_many_as_identities_and_features_and_have_their_own_rate(tmp_path):
    pml = {"loss": "ArcFaceLoss", "kwargs": {"margin": 20}, "lr": 0.5}
    cfg = configured(tmp_path, {"name": "pml", "pml": pml})
    cfg.merge_from_list(["train.lr_scheduler", "multi_step", "train.stepsize", "[1]", "train.staged_lr", "True"])
    engine = built(cfg, make_image_manager(tmp_path))
    assert engine.criterion.W.shape == (512, 6)
    assert engine.criterion.margin == pytest.approx(math.radians(20))
    assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([0.5, 0.0001, 0.001])
    # torchreid logs the rate of the network's new layers.
    assert engine.get_current_lr() == 0.001
    engine.update_lr()
    assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([0.05, 0.00001, 0.0001])


def test_without_a_rate_weights_learn_as_the_network(tmp_path):
    engine = built(
        configured(tmp_path, {"name": "pml", "pml": {"loss": "ProxyAnchorLoss"}}), make_image_manager(tmp_path)
    )
    assert [group["lr"] for group in engine.optimizer.param_groups] == [0.001, 0.001]


@pytest.mark.parametrize("network", ["osnet_x0_25", "hacnn"])  # the second has two features
def test_weights_that_nobody_would_train_are_refused(tmp_path, network):
    cfg = configured(tmp_path, {"name": "pml", "pml": {"loss": "SoftTripleLoss"}}, network)
    manager = make_image_manager(tmp_path)
    model = config.build_model(cfg, manager.num_train_pids)
    optimizer = config.build_optimizer(cfg, model)
    with pytest.raises(ValueError, match=r"SoftTripleLoss has weights that the optimizer does not train; .*criterion"):
        config.build_engine(cfg, manager, model, optimizer, None)


@pytest.mark.parametrize("section", ["drsl", "pml"])
def test_miner_reducer_distance_by_name(tmp_path, section):
    parts = {
        "miner": {"name": "MultiSimilarityMiner", "epsilon": 0.2},
        "distance": {"name": "LpDistance", "normalize_embeddings": False},
        "reducer": "AvgNonZeroReducer" if section == "pml" else "PerQueryReducer",
        "weight_m": 2,
        "weight_x": 0.25,
    }
    if section == "pml":
        parts |= {"loss": "ContrastiveLoss", "kwargs": {"neg_margin": 0.7}}
    else:
        parts |= {"temperature": 0.2, "bound_power": 1}
    engine = built(configured(tmp_path, {"name": section, section: parts}), make_image_manager(tmp_path))
    criterion = engine.criterion
    assert isinstance(engine.miner, miners.MultiSimilarityMiner) and engine.miner.epsilon == 0.2
    assert isinstance(criterion.distance, distances.LpDistance) and not criterion.distance.normalize_embeddings
    assert (engine.weight_m, engine.weight_x) == (2, 0.25)
    if section == "pml":
        assert isinstance(criterion, losses.ContrastiveLoss) and criterion.neg_margin == 0.7
        assert isinstance(criterion.reducer.reducers["pos_loss"], reducers.AvgNonZeroReducer)
    else:
        assert isinstance(criterion, DRSLoss) and criterion.bound_power == 1
        assert criterion.temperature == 0.2
        assert isinstance(criterion.reducer.reducers["sort_loss"], PerQueryReducer)
    assert isinstance(engine, engines.ImageDRSLEngine) == (section == "drsl")
    engine.run(str(tmp_path / "log"), max_epoch=1)


def test_objects_inside_objects(tmp_path):
    kwargs = {
        "embedding_regularizer": {"name": "LpRegularizer", "p": 1},
        "reducer": {"name": "MultipleReducers", "reducers": {"pos_loss": {"name": "SumReducer"}}},
    }
    criterion = criterion_of(
        configured(tmp_path, {"name": "pml", "pml": {"loss": "ContrastiveLoss", "kwargs": kwargs}})
    )
    assert criterion.embedding_regularizer.p == 1
    assert isinstance(criterion.reducer.reducers["pos_loss"], reducers.SumReducer)


@pytest.mark.parametrize("section", ["drsl", "pml"])
def test_memory_keeps_past_batches_and_has_the_miner(tmp_path, section):
    parts = {"memory_size": 20, "memory_start_epoch": 0}
    parts |= {"miner": {"name": "NegativeBudgetMiner", "negatives_per_positive": 2}}
    parts |= {"loss": "TripletMarginLoss"} if section == "pml" else {}
    engine = built(configured(tmp_path, {"name": section, section: parts}), make_image_manager(tmp_path))
    memory = engine.criterion
    assert isinstance(memory, CrossBatchMemory) and memory.embedding_memory.shape == (20, 512)
    assert engine.miner is None and isinstance(memory.miner, NegativeBudgetMiner)
    engine.run(str(tmp_path / "log"), max_epoch=1)
    # 3 batches of 8 have gone around the memory once.
    assert memory.has_been_filled and memory.queue_idx == 4
    assert (memory.embedding_memory.norm(dim=1) > 0).all()


def with_memory(tmp_path, section, start, sampler="RandomIdentitySampler", warmup_epoch=0):
    cfg = configured(tmp_path, {"name": section, section: {"memory_size": 64, "memory_start_epoch": start}})
    cfg.train.warmup_epoch = warmup_epoch
    return built(cfg, make_image_manager(tmp_path, train_sampler=sampler, num_instances=2, batch_size_train=10))


@pytest.mark.parametrize(
    ("start", "warmup_epoch", "epochs"), [(0, 5, 0), (2, 0, 2), (-1, 0, 1), (-1, 1, 1), (-1, 3, 3)]
)
def test_epochs_without_the_memory_are_so_many_steps(tmp_path, start, warmup_epoch, epochs):
    for section, sampler in (("drsl", "RandomIdentitySampler"), ("pml", "RandomSampler")):
        engine = with_memory(tmp_path, section, start, sampler, warmup_epoch)
        # The length of torchreid's own RandomIdentitySampler would be another one.
        assert engine.criterion.warmup == epochs * len(engine.train_loader)


def test_a_memory_that_would_never_start_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"would start after 1 epochs, and train.max_epoch is 1: .*memory_start_epoch"):
        with_memory(tmp_path, "drsl", -1)


def test_a_memory_starts_after_an_epoch(tmp_path):
    engine = with_memory(tmp_path, "drsl", 1)
    memory, stored = engine.criterion, []
    engine.test = lambda **_: {}
    step = engine.step

    def step_and_look(loss):
        step(loss)
        stored.append(int((memory.embedding_memory != 0).any(1).sum()))

    engine.step = step_and_look
    engine.run(str(tmp_path / "log"), max_epoch=2)
    steps = len(engine.train_loader)
    assert stored == [0] * steps + [10 * (1 + step) for step in range(steps)]


def test_what_a_memory_needs_to_know_to_start(tmp_path):
    cfg = configured(tmp_path, {"name": "drsl", "drsl": {"memory_size": 64}})
    with pytest.raises(ValueError, match=r"loss\.drsl\.memory_start_epoch: the number of steps in an epoch is needed"):
        criterion_of(cfg)
    cfg.loss.drsl.memory_start_epoch = 0
    assert criterion_of(cfg).warmup == 0


@pytest.mark.parametrize(
    "pml", [{"loss": "ProxyAnchorLoss"}, {"loss": "ContrastiveLoss", "memory_size": 16, "memory_start_epoch": 0}]
)
def test_each_feature_of_a_network_has_weights_and_memory_of_its_own(tmp_path, pml):
    cfg = configured(tmp_path, {"name": "pml", "pml": pml}, model="hacnn")
    engine = built(cfg, make_image_manager(tmp_path, height=160, width=64))
    assert isinstance(engine.criterion, criteria.PerFeature) and len(engine.criterion) == 2
    engine.set_model_mode("train")
    engine.forward_backward(next(iter(engine.train_loader)))
    state = [next(iter(part.state_dict().values())) for part in engine.criterion]
    assert not torch.equal(*state)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"pml": {"loss": "CircelLoss"}}, r"loss\.pml\.loss: there is no 'CircelLoss'; did you mean 'CircleLoss'\?"),
        ({"pml": {"loss": "DRSL"}}, "did you mean 'DRSLoss'"),
        (
            {"pml": {"loss": "CircleLoss", "kwargs": {"margin": 1}}},
            r"CircleLoss takes no 'margin'; it is CircleLoss\(m=0\.4, gamma=80, .*distance=None",
        ),
        ({"pml": {"loss": "RankedListLoss"}}, r"RankedListLoss needs margin, Tn; it is RankedListLoss\(margin, Tn, "),
        ({"pml": {"miner": "MultiSimilarity"}}, r"loss\.pml\.miner: .*did you mean 'MultiSimilarityMiner'"),
        ({"drsl": {"miner": {"name": "MultiSimilarityMiner", "eps": 1}}}, r"loss\.drsl\.miner: .* takes no 'eps'"),
        ({"drsl": {"reducer": "PerQuerry"}}, r"loss\.drsl\.reducer: .*did you mean 'PerQueryReducer'"),
        ({"pml": {"distance": {"name": "LpDistance", "q": 1}}}, r"loss\.pml\.distance: LpDistance takes no 'q'"),
        ({"drsl": {"distance": {"p": 1}}}, r"loss\.drsl\.distance: there is no None"),
        ({"drsl": {"temperature": 0.0}}, r"loss\.drsl.*temperature must be a number above 0, got 0.0"),
        (
            {"pml": {"loss": "HistogramLoss", "kwargs": {"n_bins": 5, "delta": 1}}},
            r"loss\.pml\.loss: delta and n_bins must satisfy[^;]*; HistogramLoss is HistogramLoss\(n_bins=None",
        ),
        # PML only asserts that the distance is inverted.
        (
            {"pml": {"loss": "SoftTripleLoss", "distance": "LpDistance"}},
            r"loss\.pml\.loss: a value is wrong; SoftTripleLoss is SoftTripleLoss\(",
        ),
        (
            {"pml": {"loss": "ArcFaceLoss", "memory_size": 8}},
            "memory_size is 8, but ArcFaceLoss does not support a memory",
        ),
        ({"softmax": {}, "cross_camera": True}, "cross_camera is for .* drsl and pml, got 'softmax'; set it to False"),
    ],
)
def test_mistakes_are_answered(tmp_path, loss, message):
    cfg = configured(tmp_path, {"name": next(iter(loss)), **loss})
    with pytest.raises(InputError, match=message):
        built(cfg, make_image_manager(tmp_path))


def test_a_class_named_later_has_its_own_arguments_alone(tmp_path):
    (tmp_path / "base.yaml").write_text("loss: {pml: {miner: {name: MultiSimilarityMiner, epsilon: 0.2}}}")
    (tmp_path / "child.yaml").write_text("base: base.yaml\nloss: {pml: {miner: BatchHardMiner, kwargs: {m: 1}}}")
    cfg = get_default_config()
    cfg.merge_from_file(tmp_path / "base.yaml")
    cfg.merge_from_list(["loss.pml.miner.epsilon", "0.3"])
    assert cfg.loss.pml.miner == {"name": "MultiSimilarityMiner", "epsilon": 0.3}
    cfg.merge_from_file(tmp_path / "child.yaml")
    cfg.merge_from_list(["loss.pml.kwargs.gamma", "2"])
    assert cfg.loss.pml.miner == {"name": "BatchHardMiner"}
    assert cfg.loss.pml.kwargs == {"m": 1, "gamma": 2}
    cfg.merge_from_list(["loss.pml.miner", ""])
    assert cfg.loss.pml.miner == {}
    with pytest.raises(ValueError, match=r"'loss.pml.miner' takes a class's name, or .*, got 3"):
        cfg.merge_from_list(["loss.pml.miner", "3"])
