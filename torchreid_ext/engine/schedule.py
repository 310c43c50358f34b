"""What changes from epoch to epoch: which layers of a network train, and the warm-up of the learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pml_drsl.checks import InputError
from torchreid_ext.runtime import distributed


class Layers:
    """Freezes and unfreezes the children of a network; parameters that the user froze before stay frozen.

    Args:
        model: a network, which may be inside ``DataParallel``.
    """

    def __init__(self, model: nn.Module) -> None:
        model = distributed.unwrapped(model)
        self._children = dict(model.named_children())
        self._frozen = {id(p) for p in model.parameters() if not p.requires_grad}

    def check(self, names: Iterable[str]) -> None:
        """Raises InputError if one of the names is not the name of a child."""
        unknown = [name for name in names if name not in self._children]
        if unknown:
            raise InputError(
                f"train.open_layers: the model has no layer {', '.join(unknown)}; its layers are "
                f"{', '.join(self._children)}"
            )

    def open_all(self) -> None:
        """Lets all children train, except for the parameters that the user froze."""
        self.open_only(self._children)

    def open_only(self, names: Iterable[str]) -> None:
        """Lets only the named children train; the others get no gradients and are in evaluation mode."""
        names = set(names)
        for name, child in self._children.items():
            child.train(name in names)
            for parameter in child.parameters():
                parameter.requires_grad = name in names and id(parameter) not in self._frozen


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
