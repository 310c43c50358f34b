"""Divides the images of a configured data set among training, query and gallery, and checks that they can be used."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from pml_drsl.checks import InputError
from torchreid_ext import images
from torchreid_ext.data.options import SetOptions
from torchreid_ext.images import Row, Table

Named = tuple[str, Row]
"""The path of an image below the folder of its data set, and its row."""


def selects(entry: str, path: str) -> bool:
    """Whether an entry of ``train`` or ``test`` names ``path`` or a folder above it.

    ``**`` in the entry matches any number of folders.

    >>> selects("**/train", "some/where/train/0001/c1_0.png"), selects("train", "training/0001/c1_0.png")
    (True, False)
    """

    def match(patterns: list[str], parts: list[str]) -> bool:
        if not patterns:
            return True
        if patterns[0] == "**":
            return any(match(patterns[1:], parts[start:]) for start in range(len(parts)))
        return bool(parts) and fnmatchcase(parts[0], patterns[0]) and match(patterns[1:], parts[1:])

    return match([part for part in entry.split("/") if part not in ("", ".")], path.split("/"))


def read_csv(name: str, options: SetOptions, root: str) -> Table:
    """The table of the data set ``name``, from a CSV.

    Raises:
        InputError: as :func:`torchreid_ext.images.read_csv`.
    """
    file = Path(root).expanduser().absolute() / str(options.csv)
    if not file.is_file():
        raise InputError(f"datasets.{name}: there is no CSV {file}: set data.root (--root) or datasets.{name}.csv")
    return images.read_csv(str(file), options.cameras != "none", options.junk)


def read_folder(name: str, options: SetOptions, root: str) -> Table:
    """The table of the data set ``name``, from folders of images.

    Links are followed. An image that several paths reach counts once in each split.

    Raises:
        InputError: if a folder does not exist, no file matches the pattern, an entry of a split selects nothing, a
            query camera is unknown, a link is broken or leads to a folder above itself, or several paths give one
            image different identities or cameras.
    """
    where, table = f"datasets.{name}", Table()
    found, real_paths = _matching(where, options, root, table)
    count = Counter(row.identity for row in _unique(where, (row for _, row in found), real_paths))
    found = [(path, row) for path, row in found if count[row.identity] >= options.min_images]
    train, test = (_unique(where, split, real_paths) for split in _split(where, options, found))
    table.rows = [row._replace(split="train") for row in train] + _with_queries(where, options, test)
    return table


def _matching(where: str, options: SetOptions, root: str, table: Table) -> tuple[list[Named], dict[str, str]]:
    """The images whose names match the pattern, in the order of their names, and the real path of each.

    The table gets the files that are left out.
    """
    names = images.pattern(options.pattern, f"{where}.pattern")
    found: list[Named] = []
    real_paths: dict[str, str] = {}
    for part in options.folder:
        folder = Path(root).expanduser().absolute() / part
        if not folder.is_dir():
            raise InputError(f"{where}: there is no folder {folder}: set data.root (--root) or {where}.folder")
        for path, real in sorted(images.files(str(folder))):
            carried = images.in_name(names, path)
            if not images.is_image(path):
                table.leave_out(images.NO_IMAGES, path)
            elif carried is None:
                table.leave_out("images whose names do not match the pattern", path)
            elif carried[0] in options.junk:
                table.leave_out("images of junk", path)
            elif options.cameras == "names" and not carried[1]:
                table.leave_out(f"images whose names carry no camera, which {where}.cameras: none would use", path)
            else:
                identity, camera = carried
                row = Row(str(folder / path), identity, camera if options.cameras == "names" else "")
                found.append((path, row))
                real_paths[row.path] = real
    if not found:
        seen = table.about_left_out() or "there is no file"
        where_found = " and ".join(str(Path(root).expanduser().absolute() / part) for part in options.folder)
        raise InputError(f"{where}: no image below {where_found} matches the pattern {options.pattern!r}; {seen}")
    return found, real_paths


def _unique(where: str, rows: Iterable[Row], real_paths: Mapping[str, str]) -> list[Row]:
    """Returns the first row of each image.

    Raises:
        InputError: if one image has different identities or cameras.
    """
    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(real_paths[row.path], row)
        if other[1:] != row[1:]:
            raise InputError(
                f"{where}: {other.path} and {row.path} are links to one image, but their identities or cameras differ "
                f"({', '.join(other[1:3])} and {', '.join(row[1:3])}): remove one of them"
            )
    return list(first.values())


def _split(where: str, options: SetOptions, found: list[Named]) -> tuple[list[Row], list[Row]]:
    """Returns the images for training and for test: by the entries of ``train`` and ``test``, or at random."""
    if options.train is None or options.test is None:
        pids = sorted({row.identity for _, row in found})
        random.Random(options.seed).shuffle(pids)
        tested = set(pids[: max(1, round(len(pids) * options.test_fraction))])
        train = [row for _, row in found if row.identity not in tested]
        return train, [row for _, row in found if row.identity in tested]
    for key, entries in (("train", options.train), ("test", options.test)):
        for entry in entries:
            if not any(selects(entry, path) for path, _ in found):
                raise InputError(
                    f"{where}.{key}: {entry!r} selects none of the {len(found)} images, "
                    f"for example {found[0][0] if found else 'none'!r}"
                )
    train = [row for path, row in found if any(selects(entry, path) for entry in options.train)]
    return train, [row for path, row in found if any(selects(entry, path) for entry in options.test)]


def _with_queries(where: str, options: SetOptions, test: list[Row]) -> list[Row]:
    """The test images as queries and gallery: by camera, or by the first image of an identity and camera."""
    if options.query_cameras is None:
        return images.with_queries(test)
    cameras = sorted({row.camera for row in test})
    for camera in options.query_cameras:
        if camera not in cameras:
            raise InputError(f"{where}.query_cameras: no test image is from camera {camera!r}; there are {cameras}")
    return [row._replace(split="query" if row.camera in options.query_cameras else "gallery") for row in test]


def check_splits(name: str, table: Table, mode: str) -> None:
    """Checks that a data set can be used for training (mode ``"train"``) or for the test (another mode).

    Warns of queries that have no match in the gallery from another camera, because evaluation leaves them out.

    Raises:
        InputError: if a split that is needed is empty, training has a single identity, or an identity is in training
            and in test.
    """
    where = f"datasets.{name}"
    train, query, gallery = table.train, table.query, table.gallery
    needed = ("train",) if mode == "train" else ("query", "gallery")
    if query or gallery:
        # A test with queries alone is a mistake, and not a data set that only trains.
        needed = (*needed, "query", "gallery")
    for split in needed:
        if not table.of(split):
            hint = "; to train without a test set, set data.validation, or other data.targets" if not gallery else ""
            raise InputError(
                f"{where}: the split {split!r} has no image: see how train, query and gallery are chosen{hint}"
            )
    trained = {row.identity for row in train}
    if len(trained) == 1:
        raise InputError(f"{where}: all training images show one identity, {trained.pop()!r}: two or more are needed")
    shared = sorted(trained & {row.identity for row in (*query, *gallery)})
    if shared:
        raise InputError(
            f"{where}: {len(shared)} identities are both in training and in test, for example {shared[0]!r}: "
            "a test needs identities that are not in training"
        )
    _check_matches(where, query, gallery)


def _check_matches(where: str, query: list[Row], gallery: list[Row]) -> None:
    cameras: dict[str, set[str]] = {}
    for row in gallery:
        cameras.setdefault(row.identity, set()).add(row.camera or row.path)
    unmatched = [row for row in query if not cameras.get(row.identity, set()) - {row.camera or row.path}]
    if unmatched and len(unmatched) == len(query):
        raise InputError(
            f"{where}: no query has a match in the gallery from another camera, for example {unmatched[0].path} of "
            f"identity {unmatched[0].identity!r} and camera {unmatched[0].camera!r}. If cameras do not matter, set "
            f"{where}.cameras: none, and every other image of the identity is a match"
        )
    if unmatched:
        warnings.warn(
            f"{where}: {len(unmatched)} of {len(query)} queries have no match in the gallery from another camera, and "
            f"evaluation leaves them out, for example {unmatched[0].path}",
            stacklevel=2,
        )
