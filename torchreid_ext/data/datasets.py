"""Your own images as a torchreid data set, by configuration alone: a folder of images, or a CSV that lists them.

Importing this module registers ``synthetic_pedestrians`` and, for video, ``synthetic_tracklets``;
:func:`register_datasets` registers the sets a configuration describes. A data set of either kind is a
:class:`ConfiguredDataset`, read by :mod:`torchreid_ext.data.listing`.
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
"""A path, an identity's and a camera's number, as torchreid's data sets hold them."""


def _numbers(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(set(names)))}


def _numbered(splits: Splits) -> list[list[Item]]:
    """Replaces names by numbers from 0, in the names' order; returns train, query and gallery.

    Identities of training are numbered by themselves. A camera has one number everywhere; training's come first, so
    that they have no gaps, on which torchreid counts when it joins data sets.
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

    Identities and cameras may have any names. Training's identities are numbered 0..n-1 by themselves, as classifiers
    need it; those of query and gallery together.

    Args:
        name: what the data set is called in messages.
        options: from :func:`torchreid_ext.data.options.make_options`.
        root: the folder that ``folder`` or ``csv`` of the options are below.
        kwargs: what torchreid's data managers pass (transform, k_tfm, mode, combineall, verbose, ...). Those that
            speak of other data sets (split_id, cuhk03_labeled, ...) are ignored.

    Raises:
        InputError: for whatever is wrong with the data, naming the data set, the file or value and the fix.
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
        """Adds the test images to the training set, each once, its identities numbered after training's.

        torchreid's own fails where a query's identity is not in the gallery, and repeats images that are in both.
        """
        tested = sorted({*self.query, *self.gallery})
        first = self.get_num_pids(self.train)
        pids = {pid: number for number, pid in enumerate(sorted({item[1] for item in tested}), first)}
        self.train += [(path, pids[pid], camid, dataset) for path, pid, camid, dataset in tested]
        self.num_train_pids = self.get_num_pids(self.train)
        self.num_train_cams = self.get_num_cams(self.train)


class _Entry:
    """What torchreid's registry holds for a configured data set: makes it from the options of the moment.

    torchreid refuses to register a name twice, so a second configuration in the same process replaces the options.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options

    def __call__(self, **kwargs: Any) -> ConfiguredDataset:
        return ConfiguredDataset(self.name, self.options, **kwargs)


_entries: dict[str, _Entry] = {}


def register_datasets(datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes each configured data set available to torchreid's data managers by its name.

    Nothing is read from disk before a data manager asks for the data set. A name registered here before takes its new
    options. Options are checked before any name is registered.

    Options of a folder of images:
        folder: below ``data.root``; '' (default) is the root itself.
        pattern: regular expression, matched against the whole POSIX path relative to ``folder``, with named groups
            ``identity`` and ``camera``. Default: ``[ANYTHING/]IDENTITY/CAMERA_ANYTHING.png`` (or another image suffix).
            Files that do not match are not part of the set.
        train, test: lists that select files by split, each entry a path relative to ``folder`` that names a file or a
            folder with all below it; ``*``, ``?`` and ``[]`` stand for characters of one name, ``**`` for any folders.
            Files in neither are left out. Without both, identities are split at random, see the next two.
        test_fraction: share of the identities to test on, between 0 and 1; default 0.5.
        seed: of that split; default 0.
        query_cameras: cameras whose test images are queries, all other test images being gallery. Without it, the
            first image of each test identity and camera is a query and every test image is in the gallery, which is
            safe because evaluation leaves out gallery images of the query's identity and camera.
        min_images: identities with fewer images are left out; default 1.

    Options of a CSV:
        csv: path below ``data.root`` to a file with the columns path, pid, camid and split (train, query or gallery);
            paths relative to the CSV's folder. A path may stand in it once, or once as query and once as gallery.

    Args:
        datasets: name -> options.

    Raises:
        InputError: for an unknown option, a value that cannot be, or a name that torchreid uses already.
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
    # Where this module is reloaded, it is registered already.
    with contextlib.suppress(ValueError):
        register(name, dataset)


def _register_synthetic() -> None:
    _register(torchreid.data.register_image_dataset, PEDESTRIANS, SyntheticPedestrians)
    _register(torchreid.data.register_video_dataset, TRACKLETS, SyntheticTracklets)


_register_synthetic()


@contextlib.contextmanager
def without_empty_folders(root: Path) -> Iterator[None]:
    """Removes, after an error, the empty folders that torchreid makes before it tries to download a data set."""
    root_was_there = root.is_dir()
    there = set(root.glob("*"))
    try:
        yield
    except BaseException:
        for folder in [*set(root.glob("*")) - there, *([] if root_was_there else [root])]:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
