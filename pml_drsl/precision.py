"""Switches autocast and reduced-precision matrix products off for a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products without autocast, TensorFloat-32 or bfloat16, whose ranks differ; settings are restored."""
    # The getter of torch 2.4 raises in later versions once their per-backend switches have been used.
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    switches: list[Any] = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    before = [switch.fp32_precision for switch in switches] if switches else torch.get_float32_matmul_precision()
    try:
        if switches:
            for switch in switches:
                switch.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if switches:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value
        else:
            torch.set_float32_matmul_precision(str(before))
