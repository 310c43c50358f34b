"""Config keys that are derived from a dataclass of options, and those of the loss."""

import inspect
from dataclasses import dataclass

import pytest
from pytorch_metric_learning.distances import CosineSimilarity

from pml_drsl import DRSLoss
from pml_drsl.checks import InputError
from torchreid_ext import config, get_default_config
from torchreid_ext.config.keys import DRSL_ARGUMENTS
from torchreid_ext.engine.options import RunOptions
from torchreid_ext.runtime.options import Key, Options, documented, option


def test_arguments_reach_drsl_and_its_defaults_reach_the_config():
    assert [*DRSL_ARGUMENTS, "kwargs"] == [*inspect.signature(DRSLoss).parameters]
    cfg = get_default_config()
    cfg.merge_from_list(["loss.name", "drsl", "model.pretrained", "False", "use_gpu", "False"])
    cfg.merge_from_list(["data.height", 64, "data.width", 32, "model.name", "osnet_x0_25"])
    model = config.build_model(cfg, 3)
    default = DRSLoss()
    built = config.build_criterion(cfg, model, 3)
    assert built.extra_repr() == default.extra_repr()
    assert all(getattr(built, name) == getattr(default, name) for name in DRSL_ARGUMENTS)
    assert type(built.distance) is type(default.distance)
    cfg.merge_from_list(["loss.drsl.temperature", 1, "loss.drsl.sort_weight", 0.5, "loss.drsl.margin", 0.25])
    cfg.merge_from_list(["loss.drsl.bound_power", "None", "loss.drsl.query_chunk_size", 7])
    cfg.merge_from_list(["loss.drsl.distance", "CosineSimilarity"])
    built = config.build_criterion(cfg, model, 3)
    assert (built.temperature, built.sort_weight, built.margin) == (1.0, 0.5, 0.25)
    assert (built.bound_power, built.query_chunk_size) == (None, 7)
    assert isinstance(built.distance, CosineSimilarity)
    cfg.merge_from_list(["loss.drsl.query_chunk_size", "None"])
    assert config.build_criterion(cfg, model, 3).query_chunk_size is None
    with pytest.raises(InputError, match=r"'loss\.drsl\.query_chunk_size' takes None or a whole number, got 'many'"):
        cfg.merge_from_list(["loss.drsl.query_chunk_size", "many"])


@documented
@dataclass(frozen=True, kw_only=True)
class Cooking(Options):
    """Options of a meal."""

    minutes: int = option("stove.minutes", 10, "time on the stove", least=1, config_default=20)
    fuel: str = option("stove.fuel", "gas", "gas or wood", choices=("gas", "wood"))
    salt: float = option("", 0.5, "spoons of salt", least=0)
    tastings: list[int] = option("", [5], "minutes after which the cook tastes", least=0)


def test_options():
    assert Cooking.keys() == {
        "stove.minutes": Key(20, "time on the stove", least=1, name="minutes"),
        "stove.fuel": Key("gas", "gas or wood", choices=("gas", "wood"), name="fuel"),
    }
    assert Cooking().arguments() == {"minutes": 10, "fuel": "gas", "salt": 0.5, "tastings": [5]}
    assert Cooking(salt=0).salt == 0 and Cooking(salt=0.25).salt == 0.25
    assert Cooking().tastings is not Cooking().tastings
    assert "minutes: time on the stove (``stove.minutes``)" in Cooking.__doc__


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"minutes": 0}, "stove.minutes takes whole numbers of 1 or more, got 0"),
        ({"minutes": "10"}, "stove.minutes takes whole numbers of 1 or more, got '10'"),
        ({"minutes": True}, "got True"),
        ({"tastings": []}, "tastings takes a list of one or more entries, got []"),
        ({"tastings": [1, -1]}, "tastings takes whole numbers of 0 or more, got -1"),
        ({"salt": -0.5}, "salt takes numbers of 0 or more, got -0.5"),
        ({"salt": float("nan")}, "salt takes numbers of 0 or more, got nan"),
        ({"fuel": "coal"}, "stove.fuel must be one of gas, wood, got 'coal'"),
        ({"minuets": 3}, "there is no option 'minuets'; did you mean 'minutes'?"),
    ],
)
def test_wrong_options(given, message):
    with pytest.raises(InputError) as caught:
        Cooking.of(given)
    assert message in str(caught.value)


def test_every_option_of_a_run_is_taken_from_its_key():
    cfg = get_default_config()
    changed = {}
    for key, entry in RunOptions.keys().items():
        other = {bool: lambda x: not x, int: lambda x: x + 2, list: lambda x: x * 2, str: lambda x: f"{x}2"}
        value = other[type(entry.default)](entry.default)
        if entry.choices:
            value = next(choice for choice in entry.choices if choice != entry.default)
        cfg.merge_from_list([key, value])
        changed[entry.name] = value
    options = config.run_options(cfg)
    assert options.arguments() == changed
    assert options.test_only and options.last_test().items() <= changed.items() and options.last_test()["rerank"]
    assert not options.test_between()["picture"]
    # As torchreid does.
    assert not RunOptions(rerank=True).last_test()["rerank"]
