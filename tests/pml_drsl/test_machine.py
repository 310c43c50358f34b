"""Freed memory is kept, where the C library can be told to."""

import platform
import subprocess
import sys

import pytest

from pml_drsl import machine

# Counts the pages that the system has to give anew while the same 64 MB are allocated and freed.
COUNT = """
import ctypes, resource, sys
from pml_drsl import machine
if sys.argv[1] == "keep":
    machine.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for turn in range(5):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(64 << 20))
    ctypes.memset(block, 1, 64 << 20)
    libc.free(ctypes.c_void_p(block))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_not_asked_for_again():
    pages = [int(subprocess.check_output([sys.executable, "-c", COUNT, word])) for word in ("keep", "as it is")]
    assert pages[0] < 100 < pages[1]


def test_nothing_happens_elsewhere(monkeypatch):
    def refuse(name):
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", refuse)
    machine.keep_freed_memory()
