"""Lists the images of a configured data set, from a folder or from a CSV, and checks that the list can be used."""

from __future__ import annotations

import csv
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from pml_drsl.checks import InputError
from torchreid_ext.data.options import Options

COLUMNS = ("path", "pid", "camid", "split")
SPLITS = ("train", "query", "gallery")


class Row(NamedTuple):
    """An image: its path, the name of its identity and the name of its camera."""

    path: str
    pid: str
    camid: str


@dataclass(frozen=True)
class Splits:
    """The images of a data set, by split."""

    train: list[Row] = field(default_factory=list)
    query: list[Row] = field(default_factory=list)
    gallery: list[Row] = field(default_factory=list)


def walk(folder: Path) -> Iterator[str]:
    """Yields the POSIX paths, relative to ``folder``, of all files below it, in the order of their names.

    Hidden files and folders are left out. Links to files and folders are followed.

    Raises:
        InputError: for a link that leads to a folder above itself, or to nothing.
    """
    for path, _ in _files(str(folder), "", ()):
        yield path


def _files(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yields two paths of every file: ``prefix`` with the path below ``folder``, and the path without any link."""
    real = os.path.realpath(folder)
    if real in above:
        raise InputError(f"{folder} is a link to {real}, a folder above it: remove the link")
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in visible:
        if entry.is_symlink() and not os.path.exists(entry.path):
            target = os.readlink(entry.path)
            raise InputError(f"{entry.path} is a link to {target!r}, which cannot be found; correct or remove the link")
        if entry.is_dir():
            yield from _files(entry.path, f"{prefix}{entry.name}/", (*above, real))
        else:
            yield prefix + entry.name, os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"


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


def read_folder(name: str, options: Options, root: str) -> Splits:
    """Lists a folder of images.

    Links are followed. An image that several paths reach counts once in each split.

    Raises:
        InputError: if the folder does not exist, no file matches the pattern, an entry of a split selects nothing, a
            query camera is unknown, a link is broken or leads to a folder above itself, or several paths give one
            image different identities or cameras.
    """
    where = f"datasets.{name}"
    folder = Path(root).expanduser().absolute() / options.folder
    if not folder.is_dir():
        raise InputError(f"{where}: there is no folder {folder}: set data.root (--root) or {where}.folder")
    pattern, rows, real_paths, example = re.compile(options.pattern), {}, {}, None
    for path, real in sorted(_files(str(folder), "", ())):
        found = pattern.fullmatch(path)
        if found is None:
            example = example or path
        else:
            rows[path] = Row(str(folder / path), found["identity"] or "", found["camera"] or "")
            real_paths[rows[path].path] = real
    if not rows:
        seen = f"for example {example!r} does not" if example else "it is empty"
        raise InputError(f"{where}: no file below {folder} matches the pattern {options.pattern!r}: {seen}")
    images = Counter(row.pid for row in _unique(where, list(rows.values()), real_paths))
    rows = {path: row for path, row in rows.items() if images[row.pid] >= options.min_images}
    train, test = (_unique(where, split, real_paths) for split in _split(where, options, rows, folder))
    return _with_queries(where, options, train, test)


def _unique(where: str, rows: list[Row], real_paths: Mapping[str, str]) -> list[Row]:
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
                f"({', '.join(other[1:])} and {', '.join(row[1:])}): remove one of them"
            )
    return list(first.values())


def _split(where: str, options: Options, rows: dict[str, Row], folder: Path) -> tuple[list[Row], list[Row]]:
    """Returns the images for training and for test: by the entries of ``train`` and ``test``, or at random."""
    if options.train is None or options.test is None:
        pids = sorted({row.pid for row in rows.values()})
        random.Random(options.seed).shuffle(pids)
        tested = set(pids[: max(1, round(len(pids) * options.test_fraction))])
        train = [row for row in rows.values() if row.pid not in tested]
        return train, [row for row in rows.values() if row.pid in tested]
    for key, entries in (("train", options.train), ("test", options.test)):
        for entry in entries:
            if not any(selects(entry, path) for path in rows):
                raise InputError(
                    f"{where}.{key}: {entry!r} selects none of the {len(rows)} images below {folder}, "
                    f"for example {next(iter(rows), 'none')!r}"
                )
    train = [row for path, row in rows.items() if any(selects(entry, path) for entry in options.train)]
    return train, [row for path, row in rows.items() if any(selects(entry, path) for entry in options.test)]


def _with_queries(where: str, options: Options, train: list[Row], test: list[Row]) -> Splits:
    """Divides the test images into queries and gallery: by camera, or by the first image of an identity and camera."""
    if options.query_cameras is None:
        first = {(row.pid, row.camid): row for row in reversed(test)}
        return Splits(train, [row for row in test if first[row.pid, row.camid] is row], test)
    cameras = sorted({row.camid for row in test})
    for camera in options.query_cameras:
        if camera not in cameras:
            raise InputError(f"{where}.query_cameras: no test image is from camera {camera!r}; there are {cameras}")
    query = [row for row in test if row.camid in options.query_cameras]
    return Splits(train, query, [row for row in test if row.camid not in options.query_cameras])


def read_csv(name: str, options: Options, root: str) -> Splits:
    """Lists the images that a CSV names.

    Raises:
        InputError: if the CSV, a column, a value or an image is missing, a split is unknown, or a path is repeated.
    """
    where = f"datasets.{name}"
    file = Path(root).expanduser().absolute() / str(options.csv)
    if not file.is_file():
        raise InputError(f"{where}: there is no CSV {file}: set data.root (--root) or {where}.csv")
    splits = Splits()
    seen: dict[str, tuple[Row, list[str]]] = {}
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, skipinitialspace=True)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{file} has no column {missing[0]!r}: its first line must name {','.join(COLUMNS)}")
        for record in reader:
            at = f"{file}, line {reader.line_num}"
            values = {column: (record[column] or "").strip() for column in COLUMNS}
            empty = [column for column, value in values.items() if not value]
            if empty:
                raise InputError(f"{at}: {empty[0]} is empty")
            split = values["split"]
            if split not in SPLITS:
                raise InputError(f"{at}: split={split!r} must be one of {', '.join(SPLITS)}")
            path = os.path.normpath(file.parent / values["path"])
            if not os.path.isfile(path):
                raise InputError(f"{at}: there is no file {path}; paths are relative to the folder of the CSV")
            row = Row(path, values["pid"], values["camid"])
            if path in seen:
                same, uses = seen[path][0] == row, sorted([*seen[path][1], split])
                if not same or uses != ["gallery", "query"]:
                    raise InputError(f"{at}: {values['path']} is in the CSV twice: remove one of the lines")
            seen.setdefault(path, (row, []))[1].append(split)
            getattr(splits, split).append(row)
    return splits


def check_splits(name: str, splits: Splits) -> None:
    """Checks that a data set can be used for training and evaluation.

    Warns of queries that have no match in the gallery from another camera, because evaluation leaves them out.

    Raises:
        InputError: if a split is empty, training has a single identity, or an identity is in training and in test.
    """
    where = f"datasets.{name}"
    for split in SPLITS:
        if not getattr(splits, split):
            raise InputError(f"{where}: the split {split!r} has no image: see how train, query and gallery are chosen")
    train = {row.pid for row in splits.train}
    if len(train) < 2:
        raise InputError(f"{where}: all training images show one identity, {train.pop()!r}: two or more are needed")
    shared = sorted(train & {row.pid for row in (*splits.query, *splits.gallery)})
    if shared:
        raise InputError(
            f"{where}: {len(shared)} identities are both in training and in test, for example {shared[0]!r}: "
            "a test needs identities that are not in training"
        )
    cameras: dict[str, set[str]] = {}
    for row in splits.gallery:
        cameras.setdefault(row.pid, set()).add(row.camid)
    unmatched = [row for row in splits.query if not cameras.get(row.pid, set()) - {row.camid}]
    if len(unmatched) == len(splits.query):
        raise InputError(
            f"{where}: no query has a match in the gallery from another camera, for example {unmatched[0]}"
        )
    if unmatched:
        warnings.warn(
            f"{where}: {len(unmatched)} of {len(splits.query)} queries have no match in the gallery from another "
            f"camera, and evaluation leaves them out, for example {unmatched[0].path}",
            stacklevel=2,
        )
