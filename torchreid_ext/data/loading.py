"""Wraps data loaders so that an unreadable image is an error; torchreid's ``read_image`` would try again for ever.

The wrapper decodes each image completely before the data set reads it for the first time. It does so once in a run,
because the workers of the loader share the record of the images that were decoded.
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

# The errors that Pillow raises for damaged files. DecompressionBombError means that the image is suspiciously large.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decodes an image completely, as torchreid does.

    Returns:
        The image in RGB.

    Raises:
        InputError: if the file is missing, empty, damaged, too large, or not an image. The message names the file.
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
    """A torchreid data set that checks the images of an entry before it reads the entry for the first time.

    Every attribute of the wrapped data set (``data``, ``train``, ``num_train_pids``, ...) can be read from this
    data set too.

    Args:
        dataset: an image or video data set of torchreid. ``dataset.data[i][0]`` is a path or a sequence of paths.

    Raises:
        InputError: when an entry is read that has an unreadable image. The message names the image.
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
        # copy and pickle read attributes before the wrapped data set is there.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)


def readable(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a loader like ``loader`` that raises InputError for an unreadable image.

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
