"""Settings of the C library's memory."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Lets the process keep the memory that it frees, instead of giving it back to the system and asking for it again.

    A training step allocates the same large tensors again and again, and the system clears all memory that it gives.
    Only glibc, the C library of most Linux systems, can be told so; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (AttributeError, OSError):
        return
    trim_threshold, mmap_max = -1, -4
    mallopt(mmap_max, 0)  # Large blocks come from the heap, too.
    mallopt(trim_threshold, -1)  # The heap never shrinks.
