"""Switches autocast and reduced-precision matrix products off for a block of code."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_depth = 0
_before: Any = None


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products without autocast, TensorFloat-32 or bfloat16, whose ranks differ; settings are restored.

    The settings belong to the process. The first block that is entered saves them and the last block that is left
    restores them, so blocks may be nested, and may run in several threads, as the backward pass of several GPUs does.
    """
    global _depth, _before
    with _lock:
        if _depth == 0:
            _before = _switch_off()
        _depth += 1
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _restore(_before)


def _switches() -> list[Any]:
    # The getter of torch 2.4 raises in later versions once their per-backend switches have been used.
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [backend for backend in backends if hasattr(backend, "fp32_precision")]


def _switch_off() -> Any:
    """Switches to full precision and returns what ``_restore`` needs."""
    switches = _switches()
    before = [switch.fp32_precision for switch in switches] if switches else torch.get_float32_matmul_precision()
    for switch in switches:
        switch.fp32_precision = "ieee"
    if not switches:
        torch.set_float32_matmul_precision("highest")
    return before


def _restore(before: Any) -> None:
    switches = _switches()
    for switch, value in zip(switches, before if switches else [], strict=True):
        switch.fp32_precision = value
    if not switches:
        torch.set_float32_matmul_precision(before)
