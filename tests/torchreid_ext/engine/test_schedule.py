"""Layers open and close, and the learning rate warms up over torchreid's schedulers."""

import math

import pytest
import torch
from torch import nn

from torchreid_ext import config, get_default_config
from torchreid_ext.engine.epoch import Layers

EPOCHS, WARMUP = 12, 4
ALONE = {
    "none": lambda epoch: 1.0,
    "single_step": lambda epoch: 0.1 ** (epoch // 6),
    "multi_step": lambda epoch: 0.1 ** ((epoch >= 6) + (epoch >= 9)),
    "cosine": lambda epoch: (1 + math.cos(math.pi * epoch / EPOCHS)) / 2,
}


def scheduled(name, warmup):
    cfg = get_default_config()
    cfg.merge_from_list(["train.lr_scheduler", name, "train.max_epoch", EPOCHS, "train.warmup_epoch", warmup])
    cfg.train.stepsize = [6, 9] if name == "multi_step" else [6]
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 3.0}], lr=0.5)
    return optimizer, config.build_scheduler(cfg, optimizer)


def epochs(optimizer, scheduler, number):
    rates = []
    for _ in range(number):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return rates


@pytest.mark.parametrize("name", ALONE)
def test_the_rate_rises_linearly_and_then_follows_the_scheduler(name):
    for warmup in (0, 1, WARMUP):
        optimizer, scheduler = scheduled(name, warmup)
        assert (scheduler is None) == (name == "none" and warmup < 2)
        for epoch, found in enumerate(epochs(optimizer, scheduler, EPOCHS)):
            factor = ALONE[name](epoch) * min(1, (epoch + 1) / max(warmup, 1))
            assert found == pytest.approx([0.5 * factor, 3.0 * factor])


@pytest.mark.parametrize("name", ["multi_step", "none"])
def test_its_state_is_saved_and_resumed_safely(tmp_path, name):
    optimizer, scheduler = scheduled(name, WARMUP)
    wanted = epochs(optimizer, scheduler, EPOCHS)[6:]
    optimizer, scheduler = scheduled(name, WARMUP)
    epochs(optimizer, scheduler, 6)
    torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state")
    optimizer, scheduler = scheduled(name, WARMUP)
    states = torch.load(tmp_path / "state", weights_only=True)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    found = epochs(optimizer, scheduler, EPOCHS - 6)
    assert [rate for pair in found for rate in pair] == pytest.approx([rate for pair in wanted for rate in pair])


def network():
    model = nn.Sequential()
    for name in ("stem", "body", "classifier"):
        model.add_module(name, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    model.body[0].weight.requires_grad = False
    return model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_open_and_close(wrap):
    model = network()
    everything = trainable(model)
    layers = Layers(wrap(model))
    layers.open(["classifier"])
    assert trainable(model) == {name for name in everything if name.startswith("classifier")}
    assert (model.stem.training, model.stem[1].training, model.classifier[1].training) == (False, False, True)
    layers.open(["body"])
    assert trainable(model) == {"body.0.bias", "body.1.weight", "body.1.bias"}
    layers.open()
    assert trainable(model) == everything


def test_unknown_layers_are_refused():
    layers = Layers(network())
    layers.check(["body", "stem"], "train.open_layers")
    with pytest.raises(
        ValueError, match=r"train\.open_layers: the model has no layer clasifier; its layers are stem, body, classifier"
    ):
        layers.check(["clasifier", "body"], "train.open_layers")
