"""Checks the options that describe a data set in a configuration (``datasets.NAME``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pml_drsl.checks import InputError, nearest
from torchreid_ext.images import JUNK, pattern


@dataclass(frozen=True)
class SetOptions:
    """The options of a data set.

    Attributes:
        folder: folder below ``data.root``, or a list of them; '' is the root itself. An identity that has one name in
            two folders is one person.
        csv: path below ``data.root`` of a CSV file (see :func:`torchreid_ext.images.read_csv`) in place of a folder.
        pattern: how the paths below a folder carry names: a key of :data:`torchreid_ext.images.NAMES`, or a regular
            expression for the whole POSIX path with the named groups identity and camera.
        cameras: ``"names"``: names (or the column camid) carry cameras, and images without one are left out;
            ``"none"``: cameras do not matter, and every other image of an identity is a match.
        train: files to train on. Each entry is a path relative to ``folder`` of a file, or of a folder with all files
            below it. ``*``, ``?`` and ``[]`` match characters of one name, ``**`` matches any number of folders.
        test: files to test on, likewise. An empty list makes a data set that only trains, an empty ``train`` one that
            is only tested on. If both are missing, the identities are split at random.
        test_fraction: share of the identities to test on, between 0 and 1.
        seed: seed of the random split.
        query_cameras: cameras whose test images are queries; all other test images are the gallery. By default, the
            first image of each test identity and camera is a query, and every test image is in the gallery.
        min_images: identities with fewer images are left out.
        junk: identities whose images are left out everywhere.
    """

    folder: tuple[str, ...] = ("",)
    csv: str | None = None
    pattern: str = "folder"
    cameras: str = "names"
    train: tuple[str, ...] | None = None
    test: tuple[str, ...] | None = None
    test_fraction: float = 0.5
    seed: int = 0
    query_cameras: tuple[str, ...] | None = None
    min_images: int = 1
    junk: tuple[str, ...] = JUNK


LISTS = {"folder": 1, "train": 0, "test": 0, "query_cameras": 1, "junk": 0}
"""Options that are lists, with the least number of entries."""

NUMBERS = {"seed": 0, "min_images": 1}
"""Options that are whole numbers, with the least."""

WITH_CSV = {"csv", "cameras", "junk"}
"""Options that a data set of a CSV may have."""


def make_options(name: str, given: Mapping[str, Any]) -> SetOptions:
    """Checks the options of the data set ``name``.

    Raises:
        InputError: for an unknown option, options that exclude each other, or a value out of range.
    """
    where = f"datasets.{name}"
    if not isinstance(given, Mapping):
        raise InputError(f"{where}={given!r} must be a mapping of options, such as {{folder: images}}")
    known = [option.name for option in fields(SetOptions)]
    for key in given:
        if key not in known:
            near = nearest(key, known)
            raise InputError(f"{where}.{key} is not an option; did you mean {near!r}? Known: {', '.join(known)}")
    _check_combination(where, given)
    options = SetOptions(**{key: _checked(where, key, value) for key, value in given.items()})
    names = pattern(options.pattern, f"{where}.pattern")
    if options.cameras == "names" and "camera" not in names.groupindex:
        raise InputError(
            f"{where}.pattern={options.pattern!r} has no group camera: add (?P<camera>...), or set {where}.cameras: "
            f"none"
        )
    return options


def _checked(where: str, key: str, value: Any) -> Any:
    """The value of an option; a list as a tuple of strings."""
    if key == "folder" and isinstance(value, str):
        return (value,)
    if key in LISTS:
        wrong = not isinstance(value, (list, tuple)) or len(value) < LISTS[key]
        takes = f"a list of {'one or more ' if LISTS[key] else ''}entries, such as [a, b]"
    elif key in NUMBERS:
        wrong, takes = type(value) is not int or value < NUMBERS[key], f"an integer of {NUMBERS[key]} or more"
    elif key == "test_fraction":
        wrong, takes = type(value) not in (int, float) or not 0 < value < 1, "greater than 0 and less than 1"
    elif key == "cameras":
        wrong, takes = value not in ("names", "none"), "names or none"
    else:
        wrong, takes = not isinstance(value, str), "a string"
    if wrong:
        raise InputError(f"{where}.{key}={value!r} must be {takes}")
    return tuple(map(str, value)) if key in LISTS else value


def _check_combination(where: str, given: Mapping[str, Any]) -> None:
    """Raises InputError for options that exclude each other."""
    if "csv" in given and not WITH_CSV.issuperset(given):
        other = sorted(set(given) - WITH_CSV)
        raise InputError(f"{where} has csv and {other}: a CSV takes {sorted(WITH_CSV)} alone, remove the others")
    if ("train" in given) != ("test" in given):
        raise InputError(f"{where} has only one of train and test: give both, or neither for a random split")
    if "train" in given and not (given["train"] or given["test"]):
        raise InputError(f"{where}.train and {where}.test are both empty: name files in one of them")
    if "train" in given and not {"test_fraction", "seed"}.isdisjoint(given):
        raise InputError(f"{where} has train and test, so there is no random split: remove test_fraction and seed")
    if given.get("cameras") == "none" and "query_cameras" in given:
        raise InputError(
            f"{where} has query_cameras and cameras: none, which contradict each other: remove one of them"
        )
