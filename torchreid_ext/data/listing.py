"""Lists the images of a configured data set: from a folder and a pattern, or from a CSV; checks that the list can work.

Options and their meaning are described where users meet them: :func:`torchreid_ext.data.datasets.register_datasets`.
"""

from __future__ import annotations

import csv
import difflib
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from pml_drsl.checks import InputError

COLUMNS = ("path", "pid", "camid", "split")
SPLITS = ("train", "query", "gallery")
DEFAULT_PATTERN = r"(?i:(?:.*/)?(?P<identity>[^/]+)/(?P<camera>[^/_]+)_[^/]*\.(?:png|jpe?g|bmp|webp|tiff?|ppm|pgm))"


class Row(NamedTuple):
    """An image: where it is, whom it shows, and which camera took it (names, not numbers)."""

    path: str
    pid: str
    camid: str


@dataclass(frozen=True)
class Splits:
    """The images of a data set by use."""

    train: list[Row] = field(default_factory=list)
    query: list[Row] = field(default_factory=list)
    gallery: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """A data set's options, checked and with defaults; ``csv`` is ``None`` for a folder of images."""

    folder: str = ""
    pattern: str = DEFAULT_PATTERN
    train: tuple[str, ...] | None = None
    test: tuple[str, ...] | None = None
    test_fraction: float = 0.5
    seed: int = 0
    query_cameras: tuple[str, ...] | None = None
    min_images: int = 1
    csv: str | None = None


def make_options(name: str, given: Mapping[str, Any]) -> Options:
    """Checks the options of data set ``name``.

    Raises:
        InputError: for an unknown option, options that exclude each other, or a value out of range.
    """
    where = f"datasets.{name}"
    if not isinstance(given, Mapping):
        raise InputError(f"{where}={given!r} must be a mapping of options, such as {{folder: images}}")
    known = [option.name for option in fields(Options)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise InputError(f"{where}.{key} is not an option; did you mean {near[0]!r}? Known: {', '.join(known)}")
    if "csv" in given and len(given) > 1:
        other = sorted(set(given) - {"csv"})
        raise InputError(f"{where} has csv and {other}: a CSV says all by itself, remove the other options")
    if ("train" in given) != ("test" in given):
        raise InputError(f"{where} has only one of train and test: give both, or neither for a split at random")
    if "train" in given and not {"test_fraction", "seed"}.isdisjoint(given):
        raise InputError(f"{where} has train and test, so nothing is split at random: remove test_fraction and seed")

    values = dict(given)
    for key in ("train", "test", "query_cameras"):
        if key in values:
            if isinstance(values[key], str) or not isinstance(values[key], (list, tuple)) or not values[key]:
                raise InputError(f"{where}.{key}={values[key]!r} must be a list with an entry or more, such as [a, b]")
            values[key] = tuple(str(entry) for entry in values[key])
    for key in ("folder", "pattern", "csv"):
        if key in values and not isinstance(values[key], str):
            raise InputError(f"{where}.{key}={values[key]!r} must be a string")
    for key, least in (("seed", 0), ("min_images", 1)):
        if key in values and (type(values[key]) is not int or values[key] < least):
            raise InputError(f"{where}.{key}={values[key]!r} must be an integer of {least} or more")
    fraction = values.get("test_fraction", 0.5)
    if type(fraction) not in (int, float) or not 0.0 < fraction < 1.0:
        raise InputError(f"{where}.test_fraction={fraction!r} must lie between 0 and 1, both excluded")
    pattern = values.get("pattern", DEFAULT_PATTERN)
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise InputError(f"{where}.pattern={pattern!r} is not a regular expression: {error}") from error
    for group in ("identity", "camera"):
        if group not in groups:
            raise InputError(f"{where}.pattern={pattern!r} lacks the group {group}: add (?P<{group}>...)")
    return Options(**values)


def _walk(folder: Path) -> Iterator[str]:
    """Yields POSIX paths, relative to ``folder``, of all files below it except hidden ones; links are followed once."""
    seen: set[str] = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(at)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in files:
            if not file.startswith("."):
                yield Path(at, file).relative_to(folder).as_posix()


def selects(entry: str, path: str) -> bool:
    """Whether ``entry`` of ``train`` or ``test`` names ``path`` or a folder above it; ``**`` is any number of folders.

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

    Raises:
        InputError: if the folder is missing, no file matches the pattern, a split's entry selects nothing, or a query
            camera is unknown.
    """
    where = f"datasets.{name}"
    folder = Path(root).expanduser().absolute() / options.folder
    if not folder.is_dir():
        raise InputError(f"{where}: there is no folder {folder}: set data.root (--root) or {where}.folder")
    pattern, rows, example = re.compile(options.pattern), {}, None
    for path in sorted(_walk(folder)):
        found = pattern.fullmatch(path)
        if found is None:
            example = example or path
        else:
            rows[path] = Row(str(folder / path), found["identity"] or "", found["camera"] or "")
    if not rows:
        seen = f"for example {example!r} does not" if example else "it is empty"
        raise InputError(f"{where}: no file below {folder} matches the pattern {options.pattern!r}: {seen}")
    images = Counter(row.pid for row in rows.values())
    rows = {path: row for path, row in rows.items() if images[row.pid] >= options.min_images}

    if options.train is not None and options.test is not None:
        chosen = []
        for key, entries in (("train", options.train), ("test", options.test)):
            for entry in entries:
                if not any(selects(entry, path) for path in rows):
                    raise InputError(
                        f"{where}.{key}: {entry!r} selects none of the {len(rows)} images below {folder}, "
                        f"for example {next(iter(rows), 'none')!r}"
                    )
            chosen.append([row for path, row in rows.items() if any(selects(entry, path) for entry in entries)])
        train, test = chosen
    else:
        pids = sorted({row.pid for row in rows.values()})
        random.Random(options.seed).shuffle(pids)
        tested = set(pids[: max(1, round(len(pids) * options.test_fraction))])
        train = [row for row in rows.values() if row.pid not in tested]
        test = [row for row in rows.values() if row.pid in tested]

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
    """Lists the images a CSV names.

    Raises:
        InputError: if the CSV, a column, a value or an image is missing, a split is unknown, or a path stands twice.
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
            raise InputError(f"{file} lacks the column {missing[0]!r}: its first line must name {','.join(COLUMNS)}")
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
                raise InputError(f"{at}: there is no file {path}; paths are relative to the CSV's folder")
            row = Row(path, values["pid"], values["camid"])
            if path in seen:
                same, uses = seen[path][0] == row, sorted([*seen[path][1], split])
                if not same or uses != ["gallery", "query"]:
                    raise InputError(f"{at}: {values['path']} stands in the CSV twice: remove one of the lines")
            seen.setdefault(path, (row, []))[1].append(split)
            getattr(splits, split).append(row)
    return splits


def check_splits(name: str, splits: Splits) -> None:
    """Checks that a data set can be trained and evaluated on.

    Warns of queries that no gallery image from another camera matches: evaluation skips them.

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
            "a test needs identities never seen in training"
        )
    cameras: dict[str, set[str]] = {}
    for row in splits.gallery:
        cameras.setdefault(row.pid, set()).add(row.camid)
    alone = [row for row in splits.query if not cameras.get(row.pid, set()) - {row.camid}]
    if len(alone) == len(splits.query):
        raise InputError(f"{where}: no query has a match in the gallery from another camera, for example {alone[0]}")
    if alone:
        warnings.warn(
            f"{where}: {len(alone)} of {len(splits.query)} queries have no match in the gallery from another camera "
            f"and will not count, for example {alone[0].path}",
            stacklevel=2,
        )
