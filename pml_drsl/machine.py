"""What this machine has: processor cores, and the memory that this process has used."""

from __future__ import annotations

import os
import sys


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
