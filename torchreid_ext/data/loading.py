"""Refuses an unreadable image, where torchreid's ``read_image`` would try again for ever.

The wrapper decodes each image completely before the wrapped data set reads it for the first time, once per run: its
record of what has been decoded is shared with the loader's workers and outlives them.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pml_drsl.checks import InputError

# What Pillow's decoders raise on damaged files. DecompressionBombError: an image too large to be meant.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decodes an image completely, as torchreid does.

    Returns:
        The image in RGB.

    Raises:
        InputError: if the file is missing, empty, truncated, damaged, too large or no image; the message names it.
    """
    if not os.path.isfile(path):
        raise InputError(f"cannot read image {os.fspath(path)!r}: there is no such file")
    if os.path.getsize(path) == 0:
        raise InputError(f"cannot read image {os.fspath(path)!r}: the file is empty; restore it or remove it")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except _DAMAGE as error:
        reason = f"it is damaged ({error})"
        if isinstance(error, UnidentifiedImageError):
            reason = "it is not an image"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"it is too large ({error})"
        raise InputError(f"cannot read image {os.fspath(path)!r}: {reason}; restore it or remove it") from error


class ReadableDataset(Dataset[Any]):
    """A torchreid data set that checks an entry's images before it reads them for the first time.

    Every attribute of the wrapped data set (``data``, ``train``, ``num_train_pids``, ...) can be read here too.

    Args:
        dataset: torchreid's image or video data set: ``dataset.data[i][0]`` is a path or a sequence of paths.

    Raises:
        InputError: on reading an entry one of whose images cannot be read; the message names the image.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._checked = torch.zeros(len(dataset), dtype=torch.uint8)
        self._checked.share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not self._checked[index]:
            paths = self.dataset.data[index][0]
            for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
                read_image(path)
            self._checked[index] = 1
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask for attributes before there is a data set to ask.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)


def readable(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a loader like ``loader`` that raises on an unreadable image instead of trying again for ever.

    The sampler (or batch sampler), generator and functions are the same objects, so the order of batches and the
    random numbers drawn are the same. A loader that this function returned is returned unchanged.

    Args:
        loader: over one of torchreid's data sets.

    Raises:
        InputError: if the data set is iterable-style, or has no ``data`` to take paths from.
    """
    dataset: Any = loader.dataset
    if isinstance(dataset, ReadableDataset):
        return loader
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "data"):
        kind = type(dataset).__name__
        raise InputError(f"{kind} is not a torchreid data set: it lacks `data`, a list of (path, pid, ...)")
    return rebuilt(loader, ReadableDataset(dataset))


def rebuilt(loader: DataLoader[Any], dataset: Any, **changes: Any) -> DataLoader[Any]:
    """A loader with the settings of ``loader`` over another data set; ``changes`` are arguments of ``DataLoader``."""
    options: dict[str, Any] = {
        name: getattr(loader, name)
        for name in (
            "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
            "generator", "prefetch_factor", "persistent_workers", "pin_memory_device",
        )
    }  # fmt: skip
    if hasattr(loader, "in_order"):
        # Since torch 2.6.
        options["in_order"] = loader.in_order
    if "batch_sampler" not in changes:
        if loader.batch_size is None and loader.batch_sampler is not None:
            options["batch_sampler"] = loader.batch_sampler
        else:
            options.update(batch_size=loader.batch_size, sampler=loader.sampler, drop_last=loader.drop_last)
    return DataLoader(dataset, **options | changes)
