"""Seeds, saves and restores the global random number generators of python, numpy and torch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seeds the global generators of python, numpy and torch, including CUDA."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def state() -> dict[str, Any]:
    """Returns the state of the generators. It holds only numbers, tensors and containers, as a checkpoint must."""
    _, keys, *numpy = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [keys.tolist(), *numpy],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(saved: dict[str, Any]) -> None:
    """Sets the generators to what ``state`` returned; those of CUDA only where there are as many devices."""
    version, keys, gauss = saved["python"]
    random.setstate((version, tuple(keys), gauss))
    keys, position, has_gauss, cached_gauss = saved["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached_gauss))
    torch.set_rng_state(saved["torch"])
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])


@contextmanager
def untouched(seed: int | None = None) -> Iterator[None]:
    """Context: the block may draw random numbers, and the generators are restored at its end. A ``seed`` seeds the
    generators of the CPU for the block, and leaves out CUDA, which is fast enough to do for every image."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if seed is None else []):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
