"""Checks values of a configuration that are wrong for every data set and network, before any work is done."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import getitem
from typing import Any

from pml_drsl.checks import InputError
from torchreid_ext.config.node import Config
from torchreid_ext.config.options import run_options
from torchreid_ext.data.samplers import SAMPLERS
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime.options import check as check_range

TRANSFORMS = ("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase")
"""Augmentations that torchreid's ``build_transforms`` knows. It ignores any other name silently."""

SCHEDULERS = ("single_step", "multi_step", "cosine", "none")

LEAST = {
    "data.workers": -1, "data.split_id": 0, "data.height": 1, "data.width": 1, "data.k_tfm": 1,
    "data.validation_seed": 0, "data.identities": 0, "video.seq_len": 1,
    "sampler.num_instances": 1, "sampler.num_cams": 1, "sampler.num_datasets": 1, "train.batch_size": 1,
    "train.warmup_epoch": 0, "train.stepsize": 1, "train.timeout": 1, "test.batch_size": 1,
}  # fmt: skip
"""The smallest value of whole numbers that are not options of a run, which have their own ranges."""


def check(cfg: Config) -> None:
    """Raises InputError for values that exclude each other, and for values out of their range."""
    for name in cfg.data.transforms:
        choose("data.transforms", name.lower(), TRANSFORMS)
    choose("train.lr_scheduler", cfg.train.lr_scheduler, SCHEDULERS)
    for key, least in LEAST.items():
        check_range(key, reduce(getitem, key.split("."), cfg), least)
    for key in ("norm_mean", "norm_std"):
        if len(cfg.data[key]) != 3:
            raise InputError(f"data.{key} takes a number for each of the 3 channels, got {cfg.data[key]}")
    run_options(cfg)
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
