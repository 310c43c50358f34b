"""What this machine has: processor cores, and the memory of this process."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress


def available_cores() -> int:
    """The number of processor cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_process_bytes() -> int | None:
    """The largest amount of main memory that this process has used so far, or None on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_process_bytes() -> None:
    """Makes ``peak_process_bytes`` start again from the memory that this process holds now. It does so only on Linux.

    Memory that the process has freed goes back to the system first. The process would otherwise still hold it, and a
    measurement would miss that it is used again.
    """
    if sys.platform != "linux":
        return
    with suppress(AttributeError):  # Not every C library can give memory back.
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def keep_freed_memory() -> None:
    """Lets the process keep the memory that it frees, instead of giving it back to the system and asking for it again.

    A training step allocates the same large tensors again and again, and the system clears all memory that it gives.
    Only glibc, the C library of most Linux systems, can be told so; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)  # Large blocks come from the heap, too.
        mallopt(trim_threshold, -1)  # The heap never shrinks.
