"""What this machine has and does: processor cores, the memory of this process, and the precision of products."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_lock = threading.Lock()
_depth = 0
_before: list[Any] = []


def available_cores() -> int:
    """The number of processor cores that this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_process_bytes(reset: bool = False) -> int | None:
    """The most main memory, in bytes, that this process has held since the last ``reset``, which starts again from what
    it holds now; None where the system does not say, as on all but Linux. ``ru_maxrss`` cannot be reset, and is
    inherited from a parent process."""
    try:
        if reset:
            # Freed memory that the process still holds would be used again unseen. Not every C library can return it.
            with suppress(AttributeError, TypeError):
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    peak = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return None if peak is None else 1024 * int(peak[1])


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products without autocast, TensorFloat-32 or bfloat16, whose ranks differ; settings are restored.

    The settings belong to the process. The first block saves them and the last restores them, so blocks may be nested,
    and may run in several threads, as the backward pass of several GPUs does."""
    import torch  # The commands count the cores before they need torch.

    global _depth, _before
    with _lock:
        if _depth == 0:
            _before = _set_precision(None)
        _depth += 1
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _set_precision(_before)


def _set_precision(values: list[Any] | None) -> list[Any]:
    """Switches to full precision, or to what an earlier call returned. Returns the values before."""
    import torch

    # The getter of torch 2.4 raises in later versions once their per-backend switches have been used.
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    switches: list[Any] = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    before = [switch.fp32_precision for switch in switches] or [torch.get_float32_matmul_precision()]
    if not switches:
        torch.set_float32_matmul_precision(values[0] if values else "highest")
    for switch, value in zip(switches, values or ["ieee"] * len(switches), strict=False):
        # A switch that inherited its value goes on to follow the setting above it. One that was set to the same value
        # cannot be told from it, and follows it too.
        switch.fp32_precision = "ieee" if values is None else "none"
        if switch.fp32_precision != value:
            switch.fp32_precision = value
    return before


def keep_freed_memory() -> None:
    """Lets the process keep the memory that it frees, where the C library is glibc, as on most Linux systems. A
    training step allocates the same large tensors again and again, and the system clears all memory that it gives."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap, too.
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks.
