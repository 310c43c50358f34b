"""The options of a configured data set, and how they divide its images among training, query and gallery."""

from __future__ import annotations

import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from pml_drsl.checks import InputError
from torchreid_ext import images
from torchreid_ext.images import JUNK, Row, Table
from torchreid_ext.runtime.options import Options, documented, option


class _Found(NamedTuple):
    """An image of a folder: its path below the folder, its path without any link, and its row."""

    path: str
    real: str
    row: Row


@documented
@dataclass(frozen=True, kw_only=True)
class SetOptions(Options):
    """The options of a data set (``datasets.NAME``)."""

    # fmt: off
    folder: Sequence[str] = option("", [""],
        "folder below data.root, or a list of them; empty for data.root itself. One name in two folders is one person")
    csv: str | None = option("", None, "CSV file below data.root, in place of a folder", kind=str)
    pattern: str = option("", "folder",
        "how paths below a folder carry names: folder, market, msmt17, veri, or a regular expression with the groups "
        "identity and camera")
    cameras: str = option("", "names", choices=("names", "none"),
        text="`names`: an image whose name carries no camera is left out, and a CSV needs the column camid; `none`: "
        "cameras do not matter, and every other image of a person is a match")
    train: Sequence[str] | None = option("", None, kind=list, may_be_empty=True,
        text="list of files to train on, and of folders with all files below them; `*`, `?` and `[]` match characters "
        "of one name, `**` matches any folders; an empty list for a data set without training")
    test: Sequence[str] | None = option("", None, kind=list, may_be_empty=True,
        text="list of files and folders to test on; an empty list for a data set without test. Without both lists, "
        "people are drawn at random")
    test_fraction: float = option("", 0.5, "share of the people that the random draw tests on, between 0 and 1")
    seed: int = option("", 0, "seed of the random draw", least=0)
    query: Sequence[str] | None = option("", None, kind=list,
        text="list of files and folders whose images are the queries; `test` is then the gallery")
    query_cameras: Sequence[str] | None = option("", None, kind=list,
        text="cameras whose test images are queries; all other test images are the gallery")
    min_images: int = option("", 1, "people with fewer images are left out", least=1)
    junk: Sequence[str] = option("", list(JUNK), "people whose images are left out everywhere", may_be_empty=True)

    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.test_fraction < 1:
            raise InputError(f"test_fraction must be greater than 0 and less than 1, got {self.test_fraction}")

    def takes(self, path: str) -> bool:
        """Whether an image with this POSIX path below a folder of the data set would be used."""
        if images.in_name(images.pattern(self.pattern), path) is None or any(map(images.is_hidden, path.split("/"))):
            return False
        return self.train is None or any(_selected(self, [path]).values())


_OF_BASE = "where they come from a base file, give the data set another name"


def make_options(name: str, given: Mapping[str, Any]) -> SetOptions:
    """The options of the data set ``name``, from values of the types that a configuration has converted them to; a
    single name may stand for a list. Raises InputError for an unknown option, options that exclude each other, or a
    value out of range."""
    where = f"datasets.{name}"
    values = dict(given)
    for key in ("folder", "train", "test", "query", "junk", "query_cameras"):
        if (names := values.get(key)) is not None:
            listed = [names] if isinstance(names, str) else [*names]
            # Names of folders stay as they are on the disk.
            values[key] = listed if key == "folder" else [*map(images.composed, listed)]
    try:
        options = SetOptions.of(values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    of_csv = {"csv", "cameras", "junk"}
    if "csv" in given and not of_csv.issuperset(given):
        other = sorted(set(given) - of_csv)
        fault = f"{where} has csv and {other}: a CSV takes {sorted(of_csv)} alone, remove the others"
        raise InputError(f"{fault}; {_OF_BASE}")
    if (options.train is None) != (options.test is None):
        raise InputError(f"{where} has only one of train and test: give both, or neither for a random split")
    if options.train is not None and not {"test_fraction", "seed"}.isdisjoint(given):
        fault = f"{where} has train and test, so there is no random split: remove test_fraction and seed"
        raise InputError(f"{fault}; {_OF_BASE}")
    if options.query is not None and options.test is None:
        raise InputError(f"{where} has query without test, which is its gallery: give train and test too")
    for key, excluded in (("query", options.query is not None), ("cameras: none", options.cameras == "none")):
        if options.query_cameras is not None and excluded:
            raise InputError(f"{where} has query_cameras and {key}, which contradict each other: remove one")
    names = images.pattern(options.pattern, f"{where}.pattern")
    if options.cameras == "names" and "camera" not in names.groupindex:
        lacking = f"{where}.pattern={options.pattern!r} has no group camera"
        raise InputError(f"{lacking}: add (?P<camera>...), or set {where}.cameras: none")
    return options


def selects(entry: str, path: str) -> bool:
    """Whether an entry of ``train`` or the like names ``path`` or a folder above it; ``**`` is any number of folders.

    >>> selects("**/train", "some/where/train/0001/c1_0.png"), selects("train", "training/0001/c1_0.png")
    (True, False)
    """

    def match(patterns: list[str], parts: list[str]) -> bool:
        if not patterns:
            return True
        if patterns[0] == "**":
            return any(match(patterns[1:], parts[start:]) for start in range(len(parts)))
        return bool(parts) and fnmatchcase(parts[0], patterns[0]) and match(patterns[1:], parts[1:])

    return match(_parts(entry), images.composed(path).split("/"))


def _parts(entry: str) -> list[str]:
    return [part for part in entry.split("/") if part not in ("", ".")]


def _selected(options: SetOptions, paths: Iterable[str]) -> dict[str, list[str]]:
    """Which of the paths each entry of ``train``, ``test`` and ``query`` names."""
    # By the name of each image, and of each folder above it: a thousand entries would take long to match.
    named = defaultdict[str, list[str]](list)
    for path in dict.fromkeys(paths):
        parts = images.composed(path).split("/")
        for length in range(len(parts) + 1):
            named["/".join(parts[:length])].append(path)
    selected = {}
    for entry in (*(options.train or ()), *(options.test or ()), *(options.query or ())):
        # A name such as "anna [1]" names itself, and is a pattern only if there is no such name.
        selected[entry] = named.get("/".join(_parts(entry))) or [path for path in named[""] if selects(entry, path)]
    return selected


def read(name: str, options: SetOptions, root: str) -> Table:
    """The table of the data set ``name``, from folders of images or a CSV below ``root``.

    Links are followed. An image that several paths of a folder reach counts once in each split. Raises InputError if a
    folder or file is missing, no file matches the pattern, an entry of a split selects nothing, a query camera is
    unknown, a link or a CSV is wrong, or several paths give one image different identities or cameras.
    """
    where, table = f"datasets.{name}", Table()
    above = Path(root).expanduser().absolute()
    if options.csv is not None:
        file = above / options.csv
        if not file.is_file():
            raise InputError(f"{where}: there is no CSV {file}: set data.root (--root) or {where}.csv")
        try:
            return images.read_csv(str(file), options.cameras != "none", options.junk)
        except InputError as error:
            if "no column 'camid'" not in str(error):
                raise
            raise InputError(f"{error}; or, if cameras do not matter, set {where}.cameras: none") from error
    found = _matching(where, options, above, table)
    count = Counter(row.identity for row in _unique(where, found))
    found = [image for image in found if count[image.row.identity] >= options.min_images]
    for person in sorted(person for person, number in count.items() if number < options.min_images):
        table.leave_out(f"people with fewer than {options.min_images} images", person)
    train, test, query = (_unique(where, split) for split in _split(where, options, found))
    if options.query_cameras is not None:
        cameras = sorted({row.camera for row in test})
        if unknown := [camera for camera in options.query_cameras if camera not in cameras]:
            raise InputError(f"{where}.query_cameras: no test image is from camera {unknown[0]!r}; there are {cameras}")
        query = [row for row in test if row.camera in options.query_cameras]
        test = [row for row in test if row.camera not in options.query_cameras]
    elif options.query is None:
        query = images.queries(test)
    images.warn_of_distractors(where, options.pattern, (*train, *query))
    splits = {"train": train, "query": query, "gallery": test}
    table.rows = [row._replace(split=split) for split, rows in splits.items() for row in rows]
    return table


def _matching(where: str, options: SetOptions, root: Path, table: Table) -> list[_Found]:
    """The images that match, in order; ``table`` gets the names of the other files."""
    names, cameras = images.pattern(options.pattern, f"{where}.pattern"), options.cameras == "names"
    found, shown = list[_Found](), set[str]()
    for folder in [root / part for part in options.folder]:
        if not folder.is_dir():
            raise InputError(f"{where}: there is no folder {folder}: set data.root (--root) or {where}.folder")
        for path, real in sorted(images.files(str(folder))):
            identity, camera = images.in_name(names, path) or ("", "")
            if identity:
                shown.add(identity)
            if not images.is_image(path):
                table.leave_out(images.NO_IMAGES, path)
            elif not identity:
                table.leave_out("images whose names do not match the pattern", path)
            elif identity in options.junk:
                table.leave_out("images of junk", path)
            elif cameras and not camera:
                table.leave_out(f"images whose names carry no camera, which {where}.cameras: none would use", path)
            else:
                found.append(_Found(path, real, Row(str(folder / path), identity, camera if cameras else "")))
    images.check_junk(where, options.junk, shown)
    if not found:
        seen = table.about_left_out() or "there is no file"
        folders = " and ".join(str(root / part) for part in options.folder)
        if options.pattern == "folder" and not any("/" in path for paths in table.left_out.values() for path in paths):
            home = "the photos of a person lie in a folder of their own, PERSON/1.jpg"
            seen = f"{seen}; {home}; give the folder above as --root"
        raise InputError(f"{where}: no image below {folders} matches the pattern {options.pattern!r}; {seen}")
    # Folders that train and test name, such as train and test, stand above those of people.
    if options.train is None and (about := images.about_folders_inside(names, [image.path for image in found])):
        warnings.warn(f"{where}: {about}; if it names a split, set train and test", stacklevel=2)
    return found


def _unique(where: str, found: Iterable[_Found]) -> list[Row]:
    """The first row of each image, which must have the same identity and camera in all its rows."""
    first: dict[str, Row] = {}
    for _, real, row in found:
        other = first.setdefault(real, row)
        if other[1:] != row[1:]:
            names = " and ".join(", ".join(filter(None, (each.identity, each.camera))) for each in (other, row))
            links = f"{other.path} and {row.path} are links to one image, but their identities or cameras differ"
            raise InputError(f"{where}: {links} ({names}): remove one of them")
    return list(first.values())


def _split(where: str, options: SetOptions, found: list[_Found]) -> tuple[list[_Found], list[_Found], list[_Found]]:
    """The images for training, for the test, and of ``query``: by the entries of these lists, or at random."""
    if options.train is None or options.test is None:
        pids = sorted({image.row.identity for image in found})
        random.Random(options.seed).shuffle(pids)
        tested = set(pids[: max(1, round(len(pids) * options.test_fraction))])
        train = [image for image in found if image.row.identity not in tested]
        return train, [image for image in found if image.row.identity in tested], []
    selected = _selected(options, (image.path for image in found))

    def chosen(key: str, entries: Sequence[str]) -> list[_Found]:
        if lost := [entry for entry in entries if not selected[entry]]:
            example = found[0].path if found else "none"
            raise InputError(f"{where}.{key}: {lost[0]!r} selects none of {len(found)} images, such as {example!r}")
        paths = {path for entry in entries for path in selected[entry]}
        return [image for image in found if image.path in paths]

    return chosen("train", options.train), chosen("test", options.test), chosen("query", options.query or ())


def check_splits(name: str, table: Table, mode: str) -> None:
    """Checks that a data set can be used for training (mode ``"train"``) or for the test (another mode).

    Warns of queries without a match in the gallery from another camera, which evaluation leaves out. Raises InputError
    if all are so, a needed split is empty, training or test has a single identity, or an identity is in both.
    """
    where = f"datasets.{name}"
    train, query, gallery = (table.of(split) for split in images.SPLITS)
    needed = {"train": train} if mode == "train" else {}
    # A test with queries alone is a mistake, and not a data set that only trains.
    if query or gallery or mode != "train":
        needed |= {"query": query, "gallery": gallery}
    for split, rows in needed.items():
        if not rows:
            hint = "; to train without a test set, set data.validation, or other data.targets" if not gallery else ""
            options = "train, test, test_fraction, min_images or query_cameras (of a CSV: the column split)"
            cure = f"give images of more people, or change {options}{hint}"
            raise InputError(f"{where}: the split {split!r} has no image: {cure}")
    trained = {row.identity for row in train}
    if len(trained) == 1:
        raise InputError(f"{where}: all training images show one identity, {trained.pop()!r}: two or more are needed")
    shared = sorted(trained & {row.identity for row in (*query, *gallery)})
    if shared:
        both = f"{len(shared)} identities are both in training and in test, for example {shared[0]!r}"
        cure = "or, of folders, leave train and test out, for a random draw of identities"
        raise InputError(f"{where}: {both}: a test needs identities that are not in training: give others, {cure}")
    if mode != "train" and len({row.identity for row in gallery}) == 1:
        alone = f"the gallery shows {gallery[0].identity!r} alone, whom every query would find"
        cure = "a test needs two people: give images of more people; of a random draw, raise test_fraction"
        raise InputError(f"{where}: {alone}; {cure}")
    cameras = defaultdict(set)
    for row in gallery:
        cameras[row.identity].add(row.seen_by)
    unmatched = [row for row in query if not cameras[row.identity] - {row.seen_by}]
    if not unmatched:
        return
    one, known = unmatched[0], any(row.camera for row in query)
    lack = f"match in the gallery{' from another camera' * known}"
    if len(unmatched) == len(query):
        if not known:
            cure = "add photos; of a random draw, min_images: 2 leaves such people out"
            raise InputError(f"{where}: no test person has a second image, for example {one.identity!r}: {cure}")
        example = f"{one.path} of identity {one.identity!r} and camera {one.camera!r}"
        cure = f"set {where}.cameras: none, and every other image of the identity is a match"
        raise InputError(f"{where}: no query has a {lack}, for example {example}. If cameras do not matter, {cure}")
    some = f"{len(unmatched)} of {len(query)} queries have no {lack}"
    warnings.warn(f"{where}: {some}, and evaluation leaves them out, for example {one.path}", stacklevel=2)
