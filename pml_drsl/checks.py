"""What the hyper-parameters of losses and miners are checked by."""

from __future__ import annotations

import math


def is_real(value: object) -> bool:
    """Whether a value is a finite number; a truth value is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
