"""Wraps data loaders: images are read as everywhere in this package, and every training sample carries its own seed."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import Queue
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torchreid
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from pml_drsl.checks import InputError
from torchreid_ext.pixels import NoAccess, is_image, read_image
from torchreid_ext.runtime import distributed, generators


def _reader(kind: type) -> Callable[[Any, int], Any] | None:
    """A class's own ``__getitem__`` with our reader in place of torchreid's; None if it reads in another way."""
    method = getattr(kind, "__getitem__", None)
    if not isinstance(method, FunctionType) or "read_image" not in method.__code__.co_names:
        return None
    if method.__globals__.get("read_image") is not torchreid.utils.read_image:
        return None  # a reader of the user's own by that name
    names = {**method.__globals__, "read_image": read_image}
    return FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


def parts(entry: Any) -> Sequence[Any]:
    """What the entry of a data set is read from: its path, or those of a tracklet. A data set that reads in its own way
    may have the keys of a database there, of any type."""
    return entry if isinstance(entry, (list, tuple)) else [entry]


def files_of(entry: Any) -> Iterator[str]:
    """The ``parts`` of an entry that are files."""
    for path in parts(entry):
        if isinstance(path, (str, os.PathLike)) and os.path.isfile(path):
            yield os.fspath(path)


def names_of(items: Sequence[Any]) -> list[tuple[str, ...]]:
    """The paths of each item of a data set, with slashes. They count from the folder that all have in common, which may
    be moved, and differ from one machine of a run to another."""
    paths = [[*map(os.path.abspath, map(str, parts(item[0])))] for item in items]
    top = None
    with contextlib.suppress(ValueError):  # Images on two drives of Windows have no folder in common.
        top = os.path.commonpath([os.path.dirname(path) for several in paths for path in several])
    below = [[os.path.relpath(path, top) if top else path for path in several] for several in paths]
    return [tuple(path.replace(os.sep, "/") for path in several) for several in below]


def list_as_first(manager: Any) -> None:
    """Gives the lists of a data manager's images, in place, the order and the numbers of those of the first process.
    torchreid lists files in the order of the file system, which differs from machine to machine, and an index would be
    another image there. Raises InputError on every process if one has other images than the first."""
    files = (str, os.PathLike)
    loaders = [manager.train_loader, *(loader for splits in manager.test_loader.values() for loader in splits.values())]
    for dataset in (loader.dataset for loader in loaders) if distributed.size() > 1 else ():
        items = getattr(dataset, "data", None)
        if not isinstance(items, list) or any(not isinstance(part, files) for item in items for part in parts(item[0])):
            continue  # Other entries, such as keys of a database, come in an order of the user's own.
        names = [tuple(sorted(name)) for name in names_of(items)]  # Frames may have the order of the file system too.
        own = dict(zip(names, items, strict=True))
        listed = distributed.from_first([(name, item[1:4]) for name, item in zip(names, items, strict=True)].copy)
        odd = min(own.keys() ^ {name for name, _ in listed}, default=None)
        for process, other in enumerate(distributed.gathered(odd)):
            if other:
                unlike = f"process {process} has other images than the first, for example {other[0]}"
                raise InputError(f"{unlike}: give every machine the same data")
        items[:] = [(own[name][0], *numbers, *own[name][4:]) for name, numbers in listed]


class Draw(NamedTuple):
    """One entry of a training batch."""

    sample: int  # its index
    epoch_seed: int
    position: int  # in the epoch


class ReadableDataset(Dataset[Any]):
    """A torchreid data set whose images are read with :func:`torchreid_ext.pixels.read_image`, and whose attributes
    (``data``, ``transform``, ``train``, ...) it reads and sets.

    torchreid's own reader tries a damaged image for ever, leaves photos on their side, and makes 16-bit images white. A
    data set that reads in its own way has the image files of an entry, ``dataset.data[i][0]``, checked before it reads
    them for the first time. A ``Draw`` in place of an index is read with its seed, and each epoch of them starts
    without ``random_patch``es. Of a tracklet whose frames are drawn at random, an index always gets the same frames, so
    that tests can be compared. Raises InputError, which names it, when an unreadable image is read.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        # The workers of a loader share the record of the entries that were checked.
        self._checked = torch.zeros(len(dataset), dtype=torch.uint8)
        self._checked.share_memory_()
        self._epoch_seed: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def holds_images(self, entry: Any) -> bool:
        """Whether the entries, of which one is given, are image files; torchreid's reader reads no others."""
        kind: type = type(self.dataset)
        return _reader(kind) is not None or any(map(is_image, files_of(entry)))

    def __getattr__(self, name: str) -> Any:
        # copy and pickle read attributes before the wrapped data set is there.
        if name.startswith("__") or "dataset" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name == "dataset" or name.startswith("_")
        super().__setattr__(name, value) if own else setattr(self.dataset, name, value)

    def __getitem__(self, index: int | Draw) -> Any:
        if not isinstance(index, Draw):
            if getattr(self, "sample_method", None) != "random":
                return self._read(index)
            with generators.untouched(int(index)):
                return self._read(index)
        if index.epoch_seed != self._epoch_seed:
            self._epoch_seed = index.epoch_seed
            for step in getattr(getattr(self, "transform", None), "transforms", []):
                if hasattr(step, "patchpool"):
                    step.patchpool.clear()
        try:
            with generators.untouched(index.epoch_seed + index.position):
                return self._read(index.sample)
        except NoAccess:
            raise
        except InputError as error:
            cure = "restore it to go on with model.resume auto, or remove it and start a new run"
            every = "drsl-train --dry-run names all such images"
            raise InputError(f"{str(error).removesuffix('; restore it or remove it')}; {cure}; {every}") from error

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        samples = [self[index] for index in indices]
        if get_worker_info() is not None and indices and isinstance(first := indices[0], Draw):
            # What joins the samples may draw too, such as a mixup. No sample has this seed: generators take 32 bits.
            generators.seed_everything(first.epoch_seed + 2**31 + first.position)
        return samples

    def _read(self, index: int) -> Any:
        kind: type = type(self.dataset)
        if read := _reader(kind):
            return read(self.dataset, index)
        if index >= len(self._checked):  # A script made the data set longer.
            self._checked = torch.zeros(len(self), dtype=torch.uint8)
        if not self._checked[index]:
            for path in filter(is_image, files_of(self.dataset.data[index][0])):
                read_image(path)
            self._checked[index] = 1
        return self.dataset[index]


def readable(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a loader of the same batches as ``loader``, with our reader, which refuses an unreadable image; it may
    have it already. Raises InputError if the data set is iterable-style, or has no ``data`` with the paths."""
    dataset: Any = loader.dataset
    if isinstance(dataset, ReadableDataset):
        return loader
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "data"):
        kind = type(dataset).__name__
        raise InputError(f"{kind} is not a torchreid data set: it has no `data`, a list of (path, pid, ...)")
    start = functools.partial(_start_worker, then=loader.worker_init_fn)
    return rebuilt(loader, ReadableDataset(dataset), worker_init_fn=start)


def _start_worker(worker: int, then: Callable[[int], None] | None) -> None:
    """Takes a worker of a loader out of the process group of the run. torchrun and Ctrl-C send signals to the whole
    group, and the run must finish its batch. The run ends its workers itself; they also end if it is killed. A worker
    that cannot send a batch, as where /dev/shm is full, ends too: python would drop the batch, for which the run would
    wait for ever."""
    if os.name == "posix":
        os.setpgid(0, 0)
    kind: Any = Queue
    kind._on_queue_feeder_error = staticmethod(_end_worker)
    if then is not None:
        then(worker)
    parent, own = multiprocessing.parent_process(), multiprocessing.current_process()
    if os.name == "posix" and parent is not None:
        # torch looks from now on whether a worker gets another parent, as when its run is dead; it may be dead already.
        # The parent of a process of a fork server is the server, which waits for its last process.
        if (getattr(own, "_start_method", None) or multiprocessing.get_start_method()) == "forkserver":
            threading.Thread(target=_end_with, args=[parent], daemon=True).start()
        elif os.getppid() != parent.pid:
            os._exit(1)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _end_worker(error: Exception, batch: Any) -> None:
    try:
        print(f"a process that reads images cannot send a batch: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def check_kind(loader: DataLoader[Any]) -> None:
    """Raises InputError for a loader that makes its batches in a way of its own, which a new loader would not know."""
    if getattr(type(loader), "__iter__", None) is not DataLoader.__iter__:
        cure = "give a torch DataLoader, and do in its data set or collate_fn what this loader does"
        raise InputError(f"{type(loader).__name__} makes its batches in a way of its own, which is not kept: {cure}")


def rebuilt(loader: DataLoader[Any], dataset: Any, **changes: Any) -> DataLoader[Any]:
    """Returns a loader for another data set with the settings of ``loader``, some of which ``changes`` replaces. Raises
    InputError as ``check_kind``."""
    check_kind(loader)
    kept = (
        "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
        "generator", "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
    )  # fmt: skip
    options: dict[str, Any] = {name: getattr(loader, name) for name in kept}
    if loader.batch_size is None and loader.batch_sampler is not None:
        options["batch_sampler"] = loader.batch_sampler
    elif "batch_sampler" not in changes:
        options.update(batch_size=loader.batch_size, sampler=loader.sampler, drop_last=loader.drop_last)
    return DataLoader(dataset, **options | changes)


class SeededBatches(Sampler[list[Draw]]):
    """The batches of a batch sampler, with a seed for every index. Each process gets its share of every batch.

    The first process draws all batches of an epoch from the global generators when the epoch begins, as a run of one
    process does. Each other process then seeds its generators with its own seed, so that dropout differs.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        batches, epoch_seed = distributed.from_first(lambda: (list(self.batches), int(torch.randint(2**62, ()))))
        if not distributed.is_first():
            generators.seed_everything(epoch_seed + distributed.rank())
        positions = itertools.count()
        for batch in batches:
            yield distributed.own_share([Draw(sample, epoch_seed, next(positions)) for sample in batch])


def repeatable(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a ``readable`` loader whose epochs depend only on the state of the global generators at their start.

    With a seed for every sample, torchreid's augmentations do not depend on the workers or on what they read before, so
    a resumed epoch is equal to that of a run without interruption. Raises InputError as ``readable``, or if the loader
    does not make batches.
    """
    if isinstance(loader.batch_sampler, SeededBatches):
        return loader
    if loader.batch_sampler is None:
        raise InputError("the training loader must make batches: give it a batch_size or a batch_sampler")
    # A loader seeds its workers from its generator. From the global one, a resumed run would draw once more.
    generator, batches = torch.Generator(), SeededBatches(loader.batch_sampler)
    loader = readable(loader)
    return rebuilt(loader, loader.dataset, batch_sampler=batches, generator=generator)
