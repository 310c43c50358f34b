"""Finds the image files below folders, and reads identity, group and camera from their paths."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pml_drsl.checks import InputError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
DEFAULT_PATTERN = r"(?P<identity>(?:(?P<group>.*)/)?[^/]+)/[^/]+"
"""The folder of an image is its identity; the folder above that one is the group of the identity."""


class ImageFile(NamedTuple):
    """An image file, with the names that its path gives."""

    path: Path
    identity: str
    group: str
    camera: str


def find(folders: Sequence[Path], pattern: str = DEFAULT_PATTERN, root: Path | None = None) -> list[ImageFile]:
    """Image files below the folders whose path matches, ordered by folder and then by name; hidden files do not count.

    Args:
        folders: where to look. Symbolic links are followed.
        pattern: regular expression for the whole path, with ``/`` between names. Its groups are ``identity``
            (required), ``group`` and ``camera``. An image whose path does not match is left out.
        root: the pattern is matched with the path relative to this folder; None takes the path as it is given.

    Raises:
        InputError: for a folder that does not exist, a loop of links, a link to nothing, a pattern that is no regular
            expression or has no ``identity``, or if no image matches.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    if "identity" not in compiled.groupindex:
        raise InputError(f"pattern {pattern!r} has no group (?P<identity>...): it must say which identity an image has")
    found = []
    seen: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder")
        for path in _images_below(folder, (), seen):
            relative = root is not None and path.is_relative_to(root)
            name = (path.relative_to(root) if relative and root is not None else path).as_posix()
            match = compiled.fullmatch(name)
            if match is not None:
                names = match.groupdict(default="")
                found.append(ImageFile(path, names["identity"], names.get("group", ""), names.get("camera", "")))
    if not found:
        raise InputError(
            f"no images ({', '.join(sorted(ENDINGS))}) below {', '.join(map(str, folders))}"
            + ("" if pattern == DEFAULT_PATTERN else f" have a path that matches {pattern!r}")
        )
    return found


def _images_below(folder: Path, above: tuple[Path, ...], seen: set[Path]) -> Iterator[Path]:
    """Image files in order of name. ``above`` and ``seen`` hold the real paths of the folders that this folder is in,
    and of all folders read before: a folder that two links point to is read once."""
    real = folder.resolve()
    if real in above:
        raise InputError(f"{folder} is a link to a folder that contains it, which makes a loop; remove the link")
    if real in seen:
        return
    seen.add(real)
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_symlink():
            _check_link(path)
        if path.is_dir():
            yield from _images_below(path, (*above, real), seen)
        elif path.suffix.lower() in ENDINGS:
            yield path


def _check_link(path: Path) -> None:
    try:
        path.stat()
    except (OSError, RuntimeError) as error:
        loop = isinstance(error, RuntimeError) or error.errno == errno.ELOOP
        what = "a loop of links" if loop else "a link to nothing"
        raise InputError(f"{path} is {what}; mend it or remove it") from None
