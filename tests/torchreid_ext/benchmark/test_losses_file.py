"""Every loss and every setting that we list builds a loss on top of a recipe."""

from pathlib import Path

import torch

from torchreid_ext.benchmark import grid
from torchreid_ext.config import build
from torchreid_ext.config.node import check, flat, get_default_config

CONFIGS = Path(__file__).parents[3] / "configs"


def test_every_listed_loss_and_setting_trains_a_batch():
    features = torch.randn(16, 1280, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels, recipe, seen, number = torch.arange(8).repeat_interleave(2), get_default_config(), set(), 0
    recipe.merge_from_file(CONFIGS / "viper_mobilenetv2.yaml")
    recipe.merge_from_list(["use_gpu", "False"])
    model = build.build_model(recipe, 8)
    for file in CONFIGS.glob("losses*.yaml"):
        losses, settings = grid.read_losses(file, None)
        for name, setting in ((loss, each) for loss in losses for each in [{}, *settings[loss]]):
            cfg, number = recipe.clone(), number + 1
            keys = grid.added(name, losses[name], setting)
            cfg.merge_from_list([word for pair in keys.items() for word in pair])
            check(cfg)
            criterion = build.build_criterion(cfg, model, 8, steps=5)
            seen.add(file.name + repr(criterion) + str(flat(cfg)))
            if criterion is not None:
                (gradient,) = torch.autograd.grad(criterion(features, labels), features)
                assert gradient.isfinite().all() and gradient.any(), (name, setting)
    # No setting of a file is lost on its way into the configuration.
    assert len(seen) == number > 100


def test_each_loss_has_as_many_settings():
    _, settings = grid.read_losses(CONFIGS / "losses.yaml", None)
    assert {len(each) for name, each in settings.items() if not name.startswith("softmax")} == {5}
