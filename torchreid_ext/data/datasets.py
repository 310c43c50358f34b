"""Makes torchreid data sets from folders of images or CSVs that a configuration describes.

The import of this module registers ``synthetic_pedestrians`` (images) and ``synthetic_tracklets`` (video).
:func:`register_datasets` registers the data sets of a configuration. Each of them is a :class:`ConfiguredDataset`, and
:mod:`torchreid_ext.data.listing` reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torchreid

from pml_drsl.checks import InputError
from torchreid_ext.data.listing import Splits, check_splits, read_csv, read_folder
from torchreid_ext.data.options import Options, make_options
from torchreid_ext.data.synthetic.pedestrians import NAME as PEDESTRIANS
from torchreid_ext.data.synthetic.pedestrians import SyntheticPedestrians
from torchreid_ext.data.synthetic.tracklets import NAME as TRACKLETS
from torchreid_ext.data.synthetic.tracklets import SyntheticTracklets

__all__ = [
    "ConfiguredDataset",
    "SyntheticPedestrians",
    "SyntheticTracklets",
    "register_datasets",
    "without_empty_folders",
]

Item = tuple[str, int, int]
"""A path, the number of an identity and the number of a camera, as in torchreid's data sets."""


def _numbers(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(set(names)))}


def _numbered(splits: Splits) -> list[list[Item]]:
    """Replaces names by numbers from 0, in the order of the names, and returns train, query and gallery.

    The identities for training have their own numbers. A camera has the same number in every split. The cameras of the
    training images come first, so that their numbers have no gaps: torchreid relies on that when it joins data sets.
    """
    trained = _numbers(row.pid for row in splits.train)
    tested = _numbers(row.pid for row in (*splits.query, *splits.gallery))
    camids = _numbers(row.camid for row in splits.train)
    for camera in sorted({row.camid for row in (*splits.query, *splits.gallery)} - set(camids)):
        camids[camera] = len(camids)
    pairs = ((splits.train, trained), (splits.query, tested), (splits.gallery, tested))
    return [[(row.path, pids[row.pid], camids[row.camid]) for row in split] for split, pids in pairs]


class ConfiguredDataset(torchreid.data.ImageDataset):
    """A torchreid image data set described by options instead of code.

    Identities and cameras may have any names. The identities for training are numbered 0..n-1, as classifiers need
    them. The identities of query and gallery are numbered together, also from 0.

    Args:
        name: name of the data set, for messages.
        options: from :func:`torchreid_ext.data.options.make_options`.
        root: the folder that contains the ``folder`` or the ``csv`` of the options.
        kwargs: the arguments that torchreid's data managers pass (transform, k_tfm, mode, combineall, verbose, ...).
            Arguments for other data sets (split_id, cuhk03_labeled, ...) are ignored.

    Raises:
        InputError: if the data cannot be used. The message names the data set, the file or value, and the fix.
    """

    def __init__(self, name: str, options: Options, root: str = "", **kwargs: Any) -> None:
        self.name = name
        splits = read_csv(name, options, root) if options.csv is not None else read_folder(name, options, root)
        check_splits(name, splits)
        super().__init__(*_numbered(splits), **kwargs)

    def show_summary(self) -> None:
        """Prints the data set's name and its counts."""
        print(f"=> {self.name}")
        super().show_summary()

    def combine_all(self) -> None:
        """Adds each test image to the training set once. The new identities get the numbers after the old ones.

        torchreid's own method fails if the identity of a query is not in the gallery, and it repeats images that are
        both in query and in gallery.
        """
        tested = sorted({*self.query, *self.gallery})
        first = self.get_num_pids(self.train)
        pids = {pid: number for number, pid in enumerate(sorted({item[1] for item in tested}), first)}
        self.train += [(path, pids[pid], camid, dataset) for path, pid, camid, dataset in tested]
        self.num_train_pids = self.get_num_pids(self.train)
        self.num_train_cams = self.get_num_cams(self.train)


class _Entry:
    """The entry of a configured data set in torchreid's registry. When called, it makes the data set.

    torchreid refuses to register a name twice. A second configuration in the same process therefore replaces the
    options of this entry.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options

    def __call__(self, **kwargs: Any) -> ConfiguredDataset:
        return ConfiguredDataset(self.name, self.options, **kwargs)


_entries: dict[str, _Entry] = {}


def register_datasets(datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Registers each configured data set with torchreid's data managers, under its name.

    All options are checked before any name is registered. Files are read only when a data manager makes the data set.
    A name that this function registered before gets the new options.

    Options of a folder of images:
        folder: folder below ``data.root``. Default: '', which is the root itself.
        pattern: regular expression, matched against the whole POSIX path relative to ``folder``, with named groups
            ``identity`` and ``camera``. Default: ``[ANYTHING/]IDENTITY/CAMERA_ANYTHING.png`` (or another image suffix).
            Files that do not match are left out.
        train, test: lists of the files for training and for test. Each entry is a path relative to ``folder``. It names
            a file, or a folder with all files below it. ``*``, ``?`` and ``[]`` match characters of one name, ``**``
            matches any number of folders. Files that no entry selects are left out. If both lists are missing, the
            identities are split at random.
        test_fraction: share of the identities to test on, between 0 and 1. Default: 0.5.
        seed: seed of the random split. Default: 0.
        query_cameras: cameras whose test images are queries. All other test images are in the gallery. By default, the
            first image of each test identity and camera is a query, and every test image is in the gallery. This is
            safe because evaluation ignores gallery images that have the identity and the camera of the query.
        min_images: identities with fewer images are left out. Default: 1.

    Options of a CSV:
        csv: path below ``data.root`` of a file with the columns path, pid, camid and split (train, query or gallery).
            Paths are relative to the folder of the CSV. A path may be in the CSV once, or once as query and once as
            gallery.

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


def _register(register: Callable[[str, type], None], name: str, dataset: type) -> None:
    # If this module is reloaded, the data set is already registered.
    with contextlib.suppress(ValueError):
        register(name, dataset)


def _register_synthetic() -> None:
    _register(torchreid.data.register_image_dataset, PEDESTRIANS, SyntheticPedestrians)
    _register(torchreid.data.register_video_dataset, TRACKLETS, SyntheticTracklets)


_register_synthetic()


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
