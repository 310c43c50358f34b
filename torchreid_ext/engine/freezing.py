"""Which layers of a model train."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pml_drsl.checks import InputError
from torchreid_ext.runtime import distributed


class Layers:
    """Opens and closes the children of a model; parameters that were frozen at construction stay frozen.

    Args:
        model: a network, in ``DataParallel`` or not.
    """

    def __init__(self, model: nn.Module) -> None:
        model = distributed.unwrapped(model)
        self._children = dict(model.named_children())
        self._frozen = {id(p) for p in model.parameters() if not p.requires_grad}

    def check(self, names: Iterable[str]) -> None:
        """Raises InputError for a name that no child has."""
        unknown = [name for name in names if name not in self._children]
        if unknown:
            raise InputError(
                f"train.open_layers: the model has no {', '.join(unknown)}, but {', '.join(self._children)}"
            )

    def open_all(self) -> None:
        """All children train, their parameters as far as they were not frozen."""
        self.open_only(self._children)

    def open_only(self, names: Iterable[str]) -> None:
        """The named children train; the others are in evaluation mode and without gradients."""
        names = set(names)
        for name, child in self._children.items():
            child.train(name in names)
            for parameter in child.parameters():
                parameter.requires_grad = name in names and id(parameter) not in self._frozen
