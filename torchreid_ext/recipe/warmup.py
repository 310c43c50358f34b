"""Learning rates that rise before they fall."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from pml_drsl.checks import InputError


def warmed_up(optimizer: Optimizer, scheduler: Any, epochs: int) -> Any:
    """A scheduler that multiplies another's rate (or a constant one) by 1/N, 2/N, ..., 1 in the first N epochs.

    Raises:
        InputError: for a negative number of epochs.
    """
    if epochs < 0:
        raise InputError(f"train.warmup_epoch must be 0 (no warm-up) or more, got {epochs}")
    if epochs < 2:
        return scheduler
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / epochs, total_iters=epochs - 1)
    return torch.optim.lr_scheduler.ChainedScheduler([warmup, *([scheduler] if scheduler else [])], optimizer)
