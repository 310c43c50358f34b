"""Makes torchreid data sets from folders of images or CSVs that a configuration describes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torchreid

from pml_drsl.checks import InputError
from torchreid_ext.data.splits import SetOptions, check_splits, make_options, read
from torchreid_ext.images import SPLITS, Table


def _numbers(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(set(names)))}


def _numbered(table: Table) -> list[list[tuple[str, int, int]]]:
    """Train, query and gallery with numbers from 0 in place of the names of identities and cameras."""
    train, test = table.of("train"), table.query + table.gallery
    trained, tested = (_numbers(row.identity for row in rows) for rows in (train, test))
    # The cameras of training come first: torchreid relies on numbers without gaps when it joins data sets.
    cameras = _numbers(row.seen_by for row in train)
    for camera in sorted({row.seen_by for row in test} - set(cameras)):
        cameras[camera] = len(cameras)
    pairs = ((train, trained), (table.query, tested), (table.gallery, tested))
    return [[(row.path, pids[row.identity], cameras[row.seen_by]) for row in rows] for rows, pids in pairs]


class ConfiguredDataset(torchreid.data.ImageDataset):
    """A torchreid image data set described by options instead of code, with any names of identities and cameras.

    The identities for training are numbered from 0, and so are those of query and gallery together. The folder or CSV
    of the options (:func:`torchreid_ext.data.splits.make_options`) is below ``root``; the other arguments are those of
    torchreid's data sets. A data set without a test set has no other mode than train. Raises InputError if the data
    cannot be used. The message names the data set, the file or value, and the fix.
    """

    train: list[Any]
    query: list[Any]
    gallery: list[Any]

    def __init__(
        self,
        name: str,
        options: SetOptions,
        root: str = "",
        mode: str = "train",
        combineall: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> None:
        self.name = name
        self.table = read(name, options, root)
        check_splits(name, self.table, mode)
        splits = _numbered(self.table)
        # torchreid's constructor looks at the first item of every split, also of one that is empty.
        some = next(filter(None, splits))
        super().__init__(*(items or some for items in splits), mode=mode, verbose=False, **kwargs)
        for split, items in zip(SPLITS, splits, strict=True):
            if not items:
                setattr(self, split, [])
        if combineall:
            self.combine_all()
        self.data = getattr(self, mode)
        self.num_train_pids, self.num_train_cams = self.get_num_pids(self.train), self.get_num_cams(self.train)
        if verbose:
            self.show_summary()

    def __add__(self, other: Any) -> Any:
        # torchreid makes a new data set, whose constructor looks at the first item of every split too. Only its
        # training images are used, also where a third data set is added to it.
        some = copy.copy(self)
        some.query, some.gallery = self.query or self.train[:1], self.gallery or self.train[:1]
        return torchreid.data.ImageDataset.__add__(some, other)

    def show_summary(self) -> None:
        """Prints name, counts, and the files that were left out."""
        print(f"=> {self.name}")
        super().show_summary()
        if not any(row.camera for row in self.table.rows):
            print(f"=> {self.name}: cameras do not matter; the table counts each image as a camera of its own")
        if line := self.table.about_left_out():
            print(f"=> {self.name}: {line}")

    def combine_all(self) -> None:
        """Adds each test image to the training set once. The new identities get the numbers after the old ones.

        torchreid's own method needs the identity of each query in the gallery, and repeats images that are in both.
        """
        tested = sorted({*self.query, *self.gallery})
        first = self.get_num_pids(self.train)
        pids = {pid: number for number, pid in enumerate(sorted({item[1] for item in tested}), first)}
        self.train = self.train + [(path, pids[pid], camid, dataset) for path, pid, camid, dataset in tested]


# torchreid refuses to register a name twice. A second configuration in the same process replaces the options here.
_registered: dict[str, SetOptions] = {}


def register_datasets(datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Registers ``SetOptions`` by the data set's name with torchreid's data managers, which read the files later.

    All options are checked before any name is registered. A name that is registered already gets the new options.
    Raises InputError for an unknown option, for a value out of range, or for a name that torchreid already uses.
    """
    checked = {name: make_options(name, options) for name, options in datasets.items()}
    for name, options in checked.items():
        if name not in _registered:
            try:
                torchreid.data.register_image_dataset(name, _maker(name))
            except ValueError as error:
                raise InputError(f"datasets: torchreid has its own {name!r} already; choose another name") from error
        _registered[name] = options


def _maker(name: str) -> Callable[..., ConfiguredDataset]:
    return lambda **kwargs: ConfiguredDataset(name, _registered[name], **kwargs)


@contextlib.contextmanager
def without_empty_folders(root: Path) -> Iterator[None]:
    """Context: after an error, removes the empty folders that torchreid makes before it downloads a data set."""
    root = root.expanduser()  # as torchreid's data sets do
    root_was_there = root.is_dir()
    there = set(root.glob("*"))
    try:
        yield
    except BaseException:
        for folder in [*set(root.glob("*")) - there, *([] if root_was_there else [root])]:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
