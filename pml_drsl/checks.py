"""Validators of hyper-parameters, and the type of error that bad input raises."""

from __future__ import annotations

import math


class InputError(ValueError):
    """The user gave a value that cannot be used; the message names the value and the fix."""


def is_real(value: object) -> bool:
    """Whether a value is a finite number (a bool is not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
