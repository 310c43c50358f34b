"""Values of a configuration that are wrong whatever the data and the network: told before the work, not after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pml_drsl.checks import InputError
from torchreid_ext.config.node import Config
from torchreid_ext.config.options import run_options
from torchreid_ext.data.samplers import SAMPLERS
from torchreid_ext.runtime import distributed

TRANSFORMS = ("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase")
"""What torchreid's ``build_transforms`` knows. It leaves out any other name, silently."""

SCHEDULERS = ("single_step", "multi_step", "cosine", "none")


def check(cfg: Config) -> None:
    """Raises InputError for values that exclude each other, or that nothing can be done with."""
    for name in cfg.data.transforms:
        choose("data.transforms", str(name).lower(), TRANSFORMS)
    choose("train.lr_scheduler", cfg.train.lr_scheduler, SCHEDULERS)
    run_options(cfg)
    if cfg.test.batch_size < 1:
        raise InputError(f"test.batch_size takes whole numbers of 1 or more, got {cfg.test.batch_size}")
    if not cfg.test.evaluate:
        in_groups = cfg.sampler.train_sampler in SAMPLERS
        distributed.check_share(cfg.train.batch_size, cfg.sampler.num_instances if in_groups else 1)


def choose(key: str, value: Any, allowed: Iterable[Any]) -> Any:
    """``value``, if it is one of ``allowed``; otherwise raises InputError."""
    if value not in allowed:
        raise InputError(f"{key} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return value
