"""Layers open and close; what was frozen before stays frozen."""

import pytest
from torch import nn

from torchreid_ext.engine.freezing import Layers


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
    layers.open_only(["classifier"])
    assert trainable(model) == {name for name in everything if name.startswith("classifier")}
    assert (model.stem.training, model.stem[1].training, model.classifier[1].training) == (False, False, True)
    layers.open_only(["body"])
    assert trainable(model) == {"body.0.bias", "body.1.weight", "body.1.bias"}
    layers.open_all()
    assert trainable(model) == everything and model.stem[1].training


def test_unknown_layers_are_refused():
    layers = Layers(network())
    layers.check(["body", "stem"])
    with pytest.raises(ValueError, match="the model has no layer clasifier; its layers are stem, body, classifier"):
        layers.check(["clasifier", "body"])
