"""Checks the options that describe a data set in a configuration.

Users find the meaning of the options in :func:`torchreid_ext.data.datasets.register_datasets`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pml_drsl.checks import InputError, nearest

DEFAULT_PATTERN = r"(?i:(?:.*/)?(?P<identity>[^/]+)/(?P<camera>[^/_]+)_[^/]*\.(?:png|jpe?g|bmp|webp|tiff?|ppm|pgm))"


@dataclass(frozen=True)
class Options:
    """The checked options of a data set, with defaults. ``csv`` is ``None`` for a folder of images."""

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
    """Checks the options of the data set ``name``.

    Raises:
        InputError: for an unknown option, options that exclude each other, or a value out of range.
    """
    where = f"datasets.{name}"
    if not isinstance(given, Mapping):
        raise InputError(f"{where}={given!r} must be a mapping of options, such as {{folder: images}}")
    known = [option.name for option in fields(Options)]
    for key in given:
        if key not in known:
            near = nearest(key, known)
            raise InputError(f"{where}.{key} is not an option; did you mean {near!r}? Known: {', '.join(known)}")
    _check_combination(where, given)
    values = dict(given)
    for key in ("train", "test", "query_cameras"):
        if key in values:
            if isinstance(values[key], str) or not isinstance(values[key], (list, tuple)) or not values[key]:
                raise InputError(f"{where}.{key}={values[key]!r} must be a list of one or more entries, such as [a, b]")
            values[key] = tuple(str(entry) for entry in values[key])
    for key in ("folder", "pattern", "csv"):
        if key in values and not isinstance(values[key], str):
            raise InputError(f"{where}.{key}={values[key]!r} must be a string")
    for key, least in (("seed", 0), ("min_images", 1)):
        if key in values and (type(values[key]) is not int or values[key] < least):
            raise InputError(f"{where}.{key}={values[key]!r} must be an integer of {least} or more")
    fraction = values.get("test_fraction", 0.5)
    if type(fraction) not in (int, float) or not 0.0 < fraction < 1.0:
        raise InputError(f"{where}.test_fraction={fraction!r} must be greater than 0 and less than 1")
    _check_pattern(where, values.get("pattern", DEFAULT_PATTERN))
    return Options(**values)


def _check_combination(where: str, given: Mapping[str, Any]) -> None:
    """Raises InputError for options that exclude each other."""
    if "csv" in given and len(given) > 1:
        other = sorted(set(given) - {"csv"})
        raise InputError(f"{where} has csv and {other}: with a CSV there are no other options, remove them")
    if ("train" in given) != ("test" in given):
        raise InputError(f"{where} has only one of train and test: give both, or neither for a random split")
    if "train" in given and not {"test_fraction", "seed"}.isdisjoint(given):
        raise InputError(f"{where} has train and test, so there is no random split: remove test_fraction and seed")


def _check_pattern(where: str, pattern: str) -> None:
    """Raises InputError if the pattern is not a regular expression with the groups that are needed."""
    try:
        groups = re.compile(pattern).groupindex
    except re.error as error:
        raise InputError(f"{where}.pattern={pattern!r} is not a regular expression: {error}") from error
    for group in ("identity", "camera"):
        if group not in groups:
            raise InputError(f"{where}.pattern={pattern!r} has no group {group}: add (?P<{group}>...)")
