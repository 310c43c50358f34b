"""Makes torchreid data sets from folders of images or CSVs that a configuration describes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torchreid

from pml_drsl.checks import InputError
from torchreid_ext.data.options import SetOptions, make_options
from torchreid_ext.data.splits import check_splits, read_csv, read_folder
from torchreid_ext.images import SPLITS, Table

Item = tuple[str, int, int]
"""A path, the number of an identity and the number of a camera, as in torchreid's data sets."""


def _numbers(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(set(names)))}


def _numbered(table: Table) -> list[list[Item]]:
    """Replaces names by numbers from 0, in the order of the names, and returns train, query and gallery.

    The identities for training have their own numbers. A camera has the same number in every split; an image whose
    camera is not known has a camera of its own. The cameras of the training images come first, so that their numbers
    have no gaps: torchreid relies on that when it joins data sets.
    """
    train, test = table.train, table.query + table.gallery
    trained, tested = (_numbers(row.identity for row in rows) for rows in (train, test))
    cameras = _numbers(row.camera or row.path for row in train)
    for camera in sorted({row.camera or row.path for row in test} - set(cameras)):
        cameras[camera] = len(cameras)
    pairs = ((train, trained), (table.query, tested), (table.gallery, tested))
    return [[(row.path, pids[row.identity], cameras[row.camera or row.path]) for row in rows] for rows, pids in pairs]


class ConfiguredDataset(torchreid.data.ImageDataset):
    """A torchreid image data set described by options instead of code.

    Identities and cameras may have any names. The identities for training are numbered 0..n-1, as classifiers need
    them. The identities of query and gallery are numbered together, also from 0.

    Args:
        name: name of the data set, for messages.
        options: from :func:`torchreid_ext.data.options.make_options`.
        root: the folder that contains the ``folder`` or the ``csv`` of the options.
        mode: train, query or gallery; a data set without a test set has no other mode than train.
        combineall: train on train, query and gallery together.
        verbose: print the counts, and what was left out.
        kwargs: the other arguments that torchreid's data managers pass (transform, k_tfm, ...). Arguments for other
            data sets (split_id, cuhk03_labeled, ...) are ignored.

    Raises:
        InputError: if the data cannot be used. The message names the data set, the file or value, and the fix.
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
        self.table = read_csv(name, options, root) if options.csv is not None else read_folder(name, options, root)
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

    def show_summary(self) -> None:
        """Prints the data set's name, its counts, and the files that were left out."""
        print(f"=> {self.name}")
        super().show_summary()
        if line := self.table.about_left_out():
            print(f"=> {self.name}: {line}")

    def combine_all(self) -> None:
        """Adds each test image to the training set once. The new identities get the numbers after the old ones.

        torchreid's own method fails if the identity of a query is not in the gallery, and it repeats images that are
        both in query and in gallery.
        """
        tested = sorted({*self.query, *self.gallery})
        first = self.get_num_pids(self.train)
        pids = {pid: number for number, pid in enumerate(sorted({item[1] for item in tested}), first)}
        self.train = self.train + [(path, pids[pid], camid, dataset) for path, pid, camid, dataset in tested]


class _Entry:
    """The entry of a configured data set in torchreid's registry. When called, it makes the data set.

    torchreid refuses to register a name twice. A second configuration in the same process therefore replaces the
    options of this entry.
    """

    def __init__(self, name: str, options: SetOptions) -> None:
        self.name, self.options = name, options

    def __call__(self, **kwargs: Any) -> ConfiguredDataset:
        return ConfiguredDataset(self.name, self.options, **kwargs)


_entries: dict[str, _Entry] = {}


def register_datasets(datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Registers each configured data set with torchreid's data managers, under its name.

    All options are checked before any name is registered. Files are read only when a data manager makes the data set.
    A name that this function registered before gets the new options. The options are the attributes of
    :class:`torchreid_ext.data.options.SetOptions`.

    Args:
        datasets: the options of each data set, by its name.

    Raises:
        InputError: for an unknown option, for a value out of range, or for a name that torchreid already uses.
    """
    entries = {name: _Entry(name, make_options(name, options)) for name, options in datasets.items()}
    for name, entry in entries.items():
        if name in _entries:
            _entries[name].options = entry.options
            continue
        try:
            torchreid.data.register_image_dataset(name, entry)
        except ValueError as error:
            raise InputError(f"datasets: torchreid has its own {name!r} already; choose another name") from error
        _entries[name] = entry


@contextlib.contextmanager
def without_empty_folders(root: Path) -> Iterator[None]:
    """Context: after an error, removes the empty folders that torchreid makes before it downloads a data set."""
    root_was_there = root.is_dir()
    there = set(root.glob("*"))
    try:
        yield
    except BaseException:
        for folder in [*set(root.glob("*")) - there, *([] if root_was_there else [root])]:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
