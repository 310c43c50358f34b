"""Every loss and every setting that we list builds a loss on top of every recipe."""

from pathlib import Path

import pytest
import torch
import yaml

from torchreid_ext.benchmark import grid
from torchreid_ext.config import build
from torchreid_ext.config.node import flat, get_default_config

CONFIGS = Path(__file__).parents[3] / "configs"
LISTED = [
    (file.name, name, number)
    for file in sorted(CONFIGS.glob("losses*.yaml"))
    for name, snippet in yaml.safe_load(file.read_text()).items()
    for number in range(len(snippet.get(grid.SETTINGS, ())) + 1)
]


@pytest.fixture(scope="module")
def model():
    return build.build_model(built({}), 8)


def built(snippet):
    (run,) = grid.plan([CONFIGS / "viper_mobilenetv2.yaml"], {"loss": snippet}, [0], ["use_gpu", "False"])
    cfg = get_default_config()
    cfg.merge_from_list([word for pair in run.configuration.items() for word in pair])
    return cfg


def test_every_listed_loss_and_setting_trains_a_batch(model):
    features = torch.randn(16, 1280, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.arange(8).repeat_interleave(2)
    seen, read = set(), {file: grid.read_losses(CONFIGS / file, None) for file, *_ in LISTED}
    for file, name, number in LISTED:
        losses, settings = read[file]
        cfg = built(grid.added(name, losses[name], [{}, *settings[name]][number]))
        criterion = build.build_criterion(cfg, model, 8, steps=5)
        seen.add(file + repr(criterion) + str(flat(cfg)))
        if criterion is not None:
            (gradient,) = torch.autograd.grad(criterion(features, labels), features)
            assert gradient.isfinite().all() and gradient.any(), (name, number)
    # No setting of a file is lost on its way into the configuration.
    assert len(seen) == len(LISTED)


def test_each_loss_has_as_many_settings():
    _, settings = grid.read_losses(CONFIGS / "losses.yaml", None)
    assert {len(each) for name, each in settings.items() if not name.startswith("softmax")} == {5}
