"""Warm-up of the learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from pml_drsl.checks import InputError


def warmed_up(optimizer: Optimizer, scheduler: Any, epochs: int) -> Any:
    """Adds a linear warm-up to a scheduler: the learning rate is multiplied by 1/N, 2/N, ..., 1 in the first N epochs.

    Args:
        optimizer: the optimizer.
        scheduler: a scheduler of the optimizer; None for a constant learning rate.
        epochs: number N of epochs of the warm-up; 0 and 1 change nothing.

    Raises:
        InputError: for a negative number of epochs.
    """
    if epochs < 0:
        raise InputError(f"train.warmup_epoch must be 0 (no warm-up) or more, got {epochs}")
    if epochs < 2:
        return scheduler
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / epochs, total_iters=epochs - 1)
    return torch.optim.lr_scheduler.ChainedScheduler([warmup, *([scheduler] if scheduler else [])], optimizer)
