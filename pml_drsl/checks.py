"""The error that bad input raises, and checks of hyper-parameters. Importing this file does not import torch."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class InputError(ValueError):
    """The user gave a value that cannot be used; the message names the value and the fix."""


def is_real(value: object) -> bool:
    """Whether a value is a finite number, of Python or of NumPy (a bool is not)."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name that is most like ``name``, for the message that refuses an unknown name."""
    return difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0)[0]


def is_whole(value: object) -> bool:
    """Whether a value is an integer, of Python or of NumPy (a bool is not)."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_arguments(kind: type, names: Iterable[str]) -> None:
    """Refuses keyword arguments that no constructor of a class has, with an ``InputError`` that names the nearest."""
    parameters = [inspect.signature(base.__init__).parameters for base in kind.__mro__ if "__init__" in vars(base)]  # type: ignore[misc]
    known = {name for each in parameters for name in each if name not in ("self", "args", "kwargs")}
    for name in names:
        if name not in known:
            raise InputError(f"{kind.__name__} has no argument {name!r}; the nearest is {nearest(name, known)!r}")


def check_embeddings(name: str, x: Tensor, dim: int | None = None) -> None:
    """Refuses what is not a floating-point tensor of shape (batch, ``dim``), with an ``InputError``."""
    from torch import Tensor

    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} must be a floating-point tensor of shape (batch, dim), got {got}")
    if dim is not None and x.shape[1] != dim:
        raise InputError(f"{name} has {x.shape[1]} dimensions and embeddings {dim}; give both the same number")


def check_labels(name: str, labels: Tensor | None, size: int) -> None:
    """Refuses labels that are not an integer tensor of shape (``size``,), with an ``InputError``. None is accepted."""
    from torch import Tensor

    if labels is None:
        return
    is_tensor = isinstance(labels, Tensor)
    if not is_tensor or labels.is_floating_point() or labels.is_complex() or labels.shape != (size,):
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if is_tensor else type(labels).__name__
        raise InputError(f"{name} must be an integer tensor of shape ({size},), one for each embedding, got {got}")
