"""Values of a configuration that are wrong whatever the data and the network: told before the work, not after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pml_drsl.checks import InputError
from pml_drsl.evaluation.accuracy import METRICS
from torchreid_ext.config.node import Config
from torchreid_ext.data.samplers import SAMPLERS
from torchreid_ext.engine.stepper import AMP
from torchreid_ext.runtime import distributed

TRANSFORMS = ("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase")
"""What torchreid's ``build_transforms`` knows. It leaves out any other name, silently."""

SCHEDULERS = ("single_step", "multi_step", "cosine", "none")


def check(cfg: Config) -> None:
    """Raises InputError for values that exclude each other, or that nothing can be done with."""
    for name in cfg.data.transforms:
        choose("data.transforms", str(name).lower(), TRANSFORMS)
    choose("train.lr_scheduler", cfg.train.lr_scheduler, SCHEDULERS)
    choose("train.amp", cfg.train.amp, AMP)
    choose("test.dist_metric", cfg.test.dist_metric, METRICS)
    for key, least in (("ranks", 1), ("batch_size", 1), ("visrank_topk", 1), ("picture", 0)):
        values = cfg.test[key] if key == "ranks" else [cfg.test[key]]
        for value in values:
            if not isinstance(value, int) or value < least:
                raise InputError(f"test.{key} takes whole numbers of {least} or more, got {value!r}")
    if not cfg.test.evaluate:
        in_groups = cfg.sampler.train_sampler in SAMPLERS
        distributed.check_share(cfg.train.batch_size, cfg.sampler.num_instances if in_groups else 1)
    if cfg.train.accumulate != 1:
        raise InputError(
            f"train.accumulate {cfg.train.accumulate}: gradients are not accumulated over batches, because each image "
            f"is ranked among those of its own batch, and several small rankings are not one large one. Rank among "
            f"the images of earlier batches too with cross-batch memory, memory_size of the loss"
        )


def choose(key: str, value: Any, allowed: Iterable[Any]) -> Any:
    """``value``, if it is one of ``allowed``; otherwise raises InputError."""
    if value not in allowed:
        raise InputError(f"{key} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return value
