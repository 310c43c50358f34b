"""Wraps data loaders so that images are read as everywhere in this package, and an unreadable image is an error.

torchreid's own ``read_image`` tries for ever to read a damaged image, leaves photos on their side, and makes 16-bit
images white.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pml_drsl.checks import InputError
from torchreid_ext.pixels import read_image as read_image


@lru_cache
def _reader(kind: type) -> Callable[[Any, int], Any] | None:
    """The ``__getitem__`` of a class of data sets, with our reader in the place of torchreid's ``read_image``.

    It is the data set's own code, so that it draws the same random numbers in the same order. None for a class whose
    ``__getitem__`` reads images in another way.
    """
    method = getattr(kind, "__getitem__", None)
    if not isinstance(method, FunctionType) or "read_image" not in method.__code__.co_names:
        return None
    names = {**method.__globals__, "read_image": read_image}
    return FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


class ReadableDataset(Dataset[Any]):
    """A torchreid data set whose images are read with :func:`torchreid_ext.pixels.read_image`.

    A data set that reads in its own way has its images checked before it reads an entry for the first time.
    Every attribute of the wrapped data set (``data``, ``train``, ``num_train_pids``, ...) can be read from this data
    set too.

    Args:
        dataset: an image or video data set of torchreid. ``dataset.data[i][0]`` is a path or a sequence of paths.

    Raises:
        InputError: when an entry is read that has an unreadable image. The message names the image.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        # The workers of a loader share the record of the entries that were checked.
        self._checked = torch.zeros(len(dataset), dtype=torch.uint8)
        self._checked.share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        kind: type = type(self.dataset)
        if read := _reader(kind):
            return read(self.dataset, index)
        if not self._checked[index]:
            paths = self.dataset.data[index][0]
            for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
                read_image(path)
            self._checked[index] = 1
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        # copy and pickle read attributes before the wrapped data set is there.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)


def readable(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a loader like ``loader`` that reads images with our reader, which refuses an unreadable image.

    Both loaders share the sampler (or batch sampler), the generator and the functions, so that they give the same
    batches. A loader that this function returned before is returned unchanged.

    Args:
        loader: a loader of a torchreid data set.

    Raises:
        InputError: if the data set is iterable-style, or has no ``data`` with the paths.
    """
    dataset: Any = loader.dataset
    if isinstance(dataset, ReadableDataset):
        return loader
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "data"):
        kind = type(dataset).__name__
        raise InputError(f"{kind} is not a torchreid data set: it has no `data`, a list of (path, pid, ...)")
    return rebuilt(loader, ReadableDataset(dataset))


def rebuilt(loader: DataLoader[Any], dataset: Any, **changes: Any) -> DataLoader[Any]:
    """Returns a loader with the settings of ``loader`` for another data set.

    ``changes`` are arguments of ``DataLoader`` that replace the settings.
    """
    options: dict[str, Any] = {
        name: getattr(loader, name)
        for name in (
            "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
            "generator", "prefetch_factor", "persistent_workers", "pin_memory_device",
        )
    }  # fmt: skip
    if hasattr(loader, "in_order"):
        # Versions of torch before 2.6 do not have this setting.
        options["in_order"] = loader.in_order
    if "batch_sampler" not in changes:
        if loader.batch_size is None and loader.batch_sampler is not None:
            options["batch_sampler"] = loader.batch_sampler
        else:
            options.update(batch_size=loader.batch_size, sampler=loader.sampler, drop_last=loader.drop_last)
    return DataLoader(dataset, **options | changes)
