"""The error that bad input raises, and checks of hyper-parameters. Importing this file does not import torch."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Iterable


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
