"""Lists images in one table (path, identity, camera, split): from folders, CSV files and torchreid's data sets."""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pml_drsl.checks import InputError, nearest
from pml_drsl.evaluation.arrays import check_text, check_whole, csv_records
from torchreid_ext.pixels import SUFFIXES, needs_heif
from torchreid_ext.pixels import is_image as is_image

SPLITS = ("train", "query", "gallery")
COLUMNS = ("path", "pid", "camid", "split")

JUNK = ("-1",)
"""Identities of images that have no effect: Market-1501 has this name for its bad detections."""

NO_IMAGES = "files of kinds that are not read"
KINDS = f"names of images end in {' '.join(SUFFIXES)}"

_ENDING = rf"[^/]*(?i:{'|'.join(map(re.escape, SUFFIXES))})"
NAMES = {
    # 0002_c1s1_000451_03.jpg, and DukeMTMC-reID's 0005_c2_f0046985.jpg.
    "market": rf"(?:.*/)?(?P<identity>-1|\d+)_c(?P<camera>\d+)(?:s\d+|_f\d+){_ENDING}",
    # 0000_000_01_0303morning_0015_0.jpg
    "msmt17": rf"(?:.*/)?(?P<identity>\d+)_\d+_(?P<camera>\d+)_{_ENDING}",
    # 0001_c001_00016450_0.jpg
    "veri": rf"(?:.*/)?(?P<identity>\d+)_c(?P<camera>\d+)_{_ENDING}",
    # anna/hall_1.jpg, and anna/1.jpg, whose camera is not known.
    "folder": rf"(?:.*/)?(?P<identity>[^/]+)/(?:(?P<camera>[^/_]+)_)?{_ENDING}",
}
"""How the names of images carry identities and cameras: regular expressions for the path below a folder."""


class Row(NamedTuple):
    """An image: its path, whom it shows, which camera took it and its split; what is not known is empty."""

    path: str
    identity: str = ""
    camera: str = ""
    split: str = ""

    @property
    def seen_by(self) -> str:
        """The camera; an image whose camera is not known has a camera of its own."""
        return self.camera or self.path


@dataclass
class Table:
    """Images, those of the test perhaps as query and as gallery, and the files or people left out, by the reason."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def of(self, split: str) -> list[Row]:
        return [row for row in self.rows if row.split == split]

    @property
    def query(self) -> list[Row]:
        return self.of("query")

    @property
    def gallery(self) -> list[Row]:
        return self.of("gallery")

    def leave_out(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, []).append(name)

    def leave_out_all(self, other: Table) -> None:
        """Notes the files that another table leaves out."""
        for reason, names in other.left_out.items():
            self.left_out.setdefault(reason, []).extend(names)

    def about_left_out(self) -> str:
        """A line on what was left out; empty if that is nothing."""
        parts = []
        for reason, names in self.left_out.items():
            examples = ", ".join(map(repr, names[:2])) + (", ..." if len(names) > 2 else "")
            if any(map(needs_heif, names)):
                examples += "; pip install pillow-heif to read .heic"
            parts.append(f"{reason} ({len(names)}: {examples})")
        return f"left out: {'; '.join(parts)}" if parts else ""


def pattern(names: str, option: str = "names") -> re.Pattern[str]:
    """The regular expression for names: one of ``NAMES``, or the user's own, with the groups identity and camera.
    Raises InputError for a word that is neither, which the user gave to ``option``."""
    takes = f"one of {', '.join(NAMES)}, or a regular expression with (?P<identity>...) and perhaps (?P<camera>...)"
    if names not in NAMES and "(" not in names:
        raise InputError(f"{option} {names!r} is unknown; the nearest is {nearest(names, NAMES)!r}: give {takes}")
    try:
        compiled = re.compile(NAMES.get(names, names))
    except re.error as error:
        raise InputError(f"{option} {names!r} is not a regular expression ({error}): give {takes}") from error
    if "identity" not in compiled.groupindex:
        raise InputError(f"{option} {names!r} has no group (?P<identity>...): give {takes}")
    return compiled


def composed(text: str) -> str:
    """The text in the Unicode form NFC: Macs wrote é in the names of files as e and an accent (NFD)."""
    return unicodedata.normalize("NFC", text)


def in_name(names: re.Pattern[str], name: str) -> tuple[str, str] | None:
    """The identity and the camera, ``composed``, in a name that matches as a whole, or None."""
    match = names.fullmatch(name)
    if match is None or not match["identity"]:
        return None
    camera = (match["camera"] or "") if "camera" in names.groupindex else ""
    return composed(match["identity"]), composed(camera)


def named(path: str, names: re.Pattern[str]) -> Row:
    """An image with the identity and the camera in its path: in the file's name, or in it and the folders before it."""
    parts = Path(path).relative_to(Path(path).anchor).parts
    for length in range(1, len(parts) + 1):
        if found := in_name(names, "/".join(parts[-length:])):
            return Row(path, *found)
    return Row(path)


def spelt(rows: Sequence[Row]) -> list[Row]:
    """Images of torchreid's data sets with identities and cameras as their names spell them, where all names do, and
    tell the same apart: torchreid says 2 for 0002, or numbers people anew, and counts Market-1501's cameras from 0."""

    def one_to_one(pairs: set[tuple[str, str]]) -> bool:
        return len(pairs) == len({number for number, _ in pairs}) == len({name for _, name in pairs})

    for names in map(pattern, ("market", "msmt17", "veri")):
        read = [named(row.path, names) for row in rows]
        both = [*zip(rows, read, strict=True)]
        identities = {(old.identity, new.identity) for old, new in both}
        cameras = {(old.camera, new.camera) for old, new in both}
        if all(row.identity for row in read) and one_to_one(identities) and one_to_one(cameras):
            return [new._replace(split=old.split) for old, new in both]
    return [*rows]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out: those that begin with a point, and those in which Synology and Windows keep
    thumbnails and what was deleted."""
    return name.lower().startswith((".", "@eadir", "#recycle", "$recycle.bin"))


def files(folder: str, prefix: str = "", above: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yields the POSIX path below ``folder`` and the path without any link of every file, in the order of their names.

    Hidden names (``is_hidden``) are left out. ``prefix`` and ``above`` are of folders within folders. Raises InputError
    for a link that leads to a folder above itself, or to nothing.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise InputError(f"{folder} is a link to {real}, a folder above it: remove the link")
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    for entry in visible:
        if entry.is_symlink() and not os.path.exists(entry.path):
            target = os.readlink(entry.path)
            raise InputError(f"{entry.path} is a link to {target!r}, which cannot be found; correct or remove the link")
        if entry.is_dir():
            yield from files(entry.path, f"{prefix}{entry.name}/", (*above, real))
        else:
            yield prefix + entry.name, os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"


def check_junk(where: str, junk: Collection[str], shown: Collection[str]) -> None:
    """Raises InputError, with the place of the images, for a name in ``junk`` that none of the identities shown has."""
    if absent := sorted({*junk} - {*JUNK} - {*shown}):
        raise InputError(f"{where}: no image shows {absent[0]!r}, a name of junk: correct or remove it")


def warn_of_distractors(where: str, pattern: str, rows: Iterable[Row]) -> None:
    """Warns where a split of training or query images has Market-1501's distractors, which are pictures of anything."""
    if pattern == "market" and any(row.identity == "0000" for row in rows):
        cure = f"if they are distractors, give {where}.train and query, or add '0000' to {where}.junk"
        warnings.warn(f"{where}: 0000, as Market-1501's distractors, is trained on or searched; {cure}", stacklevel=2)


def about_folders_inside(names: re.Pattern[str], paths: Sequence[str]) -> str:
    """What to know of the first of one or more images, by their POSIX paths, whose identity ``NAMES["folder"]`` reads
    from a folder inside another, perhaps an album inside the folder of a person; empty if there is none."""
    if names.pattern != NAMES["folder"]:
        return ""
    # A folder that holds all images is no person.
    common = posixpath.commonpath({posixpath.dirname(path) for path in paths})
    above = f"{common}/" if common else ""
    inside = next((path for path in paths if path.removeprefix(above).count("/") > 1), None)
    if inside is None:
        return ""
    cure = f"If the folder above names the person, set pattern (--names) to '{re.escape(above)}(?P<identity>[^/]+)/.*'"
    return f"{inside.split('/')[-2]!r}, the innermost folder, is the identity of {inside!r}. {cure}"


def check_exists(source: str) -> None:
    """Raises InputError if there is nothing of this name from which images could be listed."""
    if not os.path.exists(source):
        raise InputError(f"{source!r} does not exist: give an image, a folder of images, or a CSV file")


def list_folder(folder: str, names: re.Pattern[str]) -> Table:
    """All images below a folder, in the order of their names, as gallery; the folder's own name is no identity. Warns
    of ``about_folders_inside``. Raises InputError if the folder has no image."""
    table, used = Table(), list[str]()
    for name, _ in files(folder):
        found = in_name(names, name) or ("", "")
        if not is_image(name):
            table.leave_out(NO_IMAGES, name)
        elif found[0] in JUNK:
            table.leave_out("images of junk", name)
        else:
            table.rows.append(Row(os.path.join(folder, name), *found, "gallery"))
            used.append(name)
    if not table.rows:
        about = table.about_left_out() or "the folder is empty"
        raise InputError(f"there is no image below {folder!r}: {KINDS}; {about}")
    if about := about_folders_inside(names, used):
        warnings.warn(f"{folder!r}: {about}", stacklevel=2)
    return table


def queries(rows: Iterable[Row]) -> list[Row]:
    """The first image of each identity and camera, as query."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        first.setdefault((row.identity, row.seen_by), row._replace(split="query"))
    return list(first.values())


def from_torchreid(dataset: Any) -> Table:
    """The images of a torchreid image data set, with the numbers of identities and cameras as names."""
    rows = (Row(path, str(p), str(c), split) for split in SPLITS for path, p, c, *_ in getattr(dataset, split))
    return Table(list(rows))


def read_csv(file: str, cameras: bool | None = True, junk: Collection[str] = JUNK) -> Table:
    """The images that a CSV file names, in its order, without those of the identities ``junk``.

    The file is UTF-8 text with the columns path, pid, camid and split (train, query or gallery), separated by commas,
    semicolons or tabs. Cameras may be missing where ``cameras`` is None, and are ignored where it is False. Paths are
    relative to the file's folder, and may have been written on Windows or a Mac. A path is there once, or as query and
    gallery. Raises InputError if a column, a value or an image is missing, a split is unknown, a path is repeated, the
    file is written in another way, or no image shows an identity of ``junk``. The message names the file, the line and
    the cure.
    """
    columns = [column for column in COLUMNS if cameras or column != "camid"]
    table, seen, shown = Table(), dict[str, list[Row]](), set[str]()
    for at, values in csv_records(file, columns, ["camid"] if cameras is None else []):
        path, identity, split = values["path"], composed(values["pid"]), values["split"]
        camera = composed(values.get("camid", ""))
        if split not in SPLITS:
            raise InputError(f"{at}: split={split!r} must be one of {', '.join(SPLITS)}")
        check_text(at, [identity, camera])
        check_whole(at, [identity, camera])
        forms = (unicodedata.normalize(form, path.replace("\\", "/")) for form in ("NFC", "NFD"))
        places = [os.path.normpath(os.path.join(os.path.dirname(file), each)) for each in (path, *forms)]
        if (full := next(filter(os.path.isfile, places), None)) is None:
            check_text(at, [path])
            raise InputError(f"{at}: there is no file {places[0]}; paths are relative to the folder of the CSV")
        shown.add(identity)
        if identity in junk:
            table.leave_out("images of junk", path)
            continue
        row = Row(full, identity, camera, split)
        twins = seen.setdefault(full, [])
        if twins and (twins[0][:3] != row[:3] or sorted(twin.split for twin in (*twins, row)) != ["gallery", "query"]):
            raise InputError(f"{at}: {path} is in the CSV twice: remove one of the lines")
        twins.append(row)
        table.rows.append(row)
    check_junk(file, junk, shown)
    return table
