"""Checks the values of a configuration before any work is done, and makes the options of a run of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import getitem
from typing import Any

from pml_drsl.checks import InputError
from torchreid_ext.config.keys import KEYS
from torchreid_ext.config.node import Config
from torchreid_ext.data.samplers import SAMPLERS
from torchreid_ext.engine.options import RunOptions
from torchreid_ext.runtime import distributed

TRANSFORMS = ("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase")
"""Augmentations that torchreid's ``build_transforms`` knows, in any case. It ignores any other name silently."""


def check(cfg: Config) -> None:
    """Raises InputError for values that are not allowed, and for values that exclude each other."""
    for key, entry in KEYS.items():
        entry.check(key, _value(cfg, key))
    for name in cfg.data.transforms:
        choose("data.transforms", name.lower(), TRANSFORMS)
    for key in ("norm_mean", "norm_std"):
        if len(cfg.data[key]) != 3:
            raise InputError(f"data.{key} takes a number for each of the 3 channels, got {cfg.data[key]}")
    try:
        cfg.data.save_dir.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"data.save_dir {cfg.data.save_dir!r} has bytes that are not UTF-8, and TensorBoard cannot write there: "
            f"choose another name"
        ) from error
    tracklets_differ = cfg.data.type == "video" and cfg.video.sample_method == "all"
    if cfg.train.chunk_size and cfg.train.sync_batchnorm and tracklets_differ:
        raise InputError(
            "train.sync_batchnorm needs as many chunks in every process, but with video.sample_method all the numbers "
            "of images differ; set train.sync_batchnorm to False, or train.chunk_size to 0"
        )
    if not cfg.test.evaluate:
        in_groups = cfg.sampler.train_sampler in SAMPLERS
        distributed.check_share(cfg.train.batch_size, cfg.sampler.num_instances if in_groups else 1)


def choose(key: str, value: Any, allowed: Iterable[Any]) -> Any:
    """``value``, if it is one of ``allowed``; otherwise raises InputError."""
    if value not in allowed:
        raise InputError(f"{key} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def run_options(cfg: Config) -> RunOptions:
    """The options of ``engine.run``.

    Raises:
        InputError: for a value that is not allowed.
    """
    return RunOptions(**{entry.name: _value(cfg, key) for key, entry in RunOptions.keys().items()})


def _value(cfg: Config, key: str) -> Any:
    return reduce(getitem, key.split("."), cfg)
