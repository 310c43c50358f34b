"""Lists the images of folders, CSV files and data sets, with the identities and cameras that their names carry."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torchreid

from pml_drsl.checks import InputError
from torchreid_ext.config import Config
from torchreid_ext.data.datasets import register_datasets, without_empty_folders
from torchreid_ext.data.listing import read_csv, walk
from torchreid_ext.data.options import DEFAULT_PATTERN, make_options

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

_MARKET = re.compile(r"(?:.*/)?(?P<identity>-1|\d+)_c(?P<camera>\d+)[^/]*")
_NAMES = (_MARKET, re.compile(DEFAULT_PATTERN))
# The folders of Market-1501's layout; DukeMTMC-reID and the drawn pedestrians have the same.
_QUERY, _GALLERY = "query", ("bounding_box_test", "gallery")
# Market-1501 gives this identity to images that its evaluation leaves out.
_LEFT_OUT = "-1"


@dataclass(frozen=True)
class Entry:
    """An image and what is known of it.

    Attributes:
        path: the image file.
        identity: whom it shows; empty if unknown.
        camera: which camera took it; empty if unknown.
    """

    path: str
    identity: str = ""
    camera: str = ""


@dataclass
class Images:
    """Query and gallery images.

    Attributes:
        query: the query images.
        gallery: the gallery images.
        ignored: files that are no images, by their names.
    """

    query: list[Entry] = field(default_factory=list)
    gallery: list[Entry] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    @property
    def labelled(self) -> bool:
        """Whether there are queries, and the identity and the camera of every image are known."""
        every = [*self.query, *self.gallery]
        return bool(self.query) and all(entry.identity and entry.camera for entry in every)


def named(path: str, name: str | None = None) -> Entry:
    """An image with the identity and the camera in its name: ``0002_c1s1_000451_03.jpg``, or ``IDENTITY/CAMERA_*.png``.

    Args:
        path: the image file.
        name: the part of the path, with slashes, that may carry the names; None for the file and its folder.
    """
    name = "/".join(Path(path).parts[-2:]) if name is None else name
    for pattern in _NAMES:
        if found := pattern.fullmatch(name):
            return Entry(path, found["identity"], found["camera"])
    return Entry(path)


def list_images(sources: Sequence[str]) -> Images:
    """The images of folders and CSV files together.

    A CSV file has the columns path, pid, camid and split; its training images are left out. A folder may have
    Market-1501's layout (``query`` and ``bounding_box_test``), or be one of these two, or hold images in any folders
    below it. Where such images are named ``IDENTITY/CAMERA_*.png``, all are gallery images, and the first of each
    identity and camera is a query too.

    Raises:
        InputError: for a source that is missing, has no image, or names an image as another source does.
    """
    images, origin = Images(), dict[tuple[str, str], str]()
    for source in sources:
        found = _listed(source)
        for role, entries in (("query", found.query), ("gallery", found.gallery)):
            for entry in entries:
                name = os.path.relpath(entry.path, source if os.path.isdir(source) else os.path.dirname(source))
                other = origin.setdefault((role, name), source)
                if other is not source:
                    raise InputError(
                        f"{other!r} and {source!r} both have a {role} image {name!r}, so their identities cannot be "
                        f"told apart: give each folder by itself, or put both below one folder and give that one"
                    )
        images.query += found.query
        images.gallery += found.gallery
        images.ignored += found.ignored
    return images


def _listed(source: str) -> Images:
    if os.path.isfile(source):
        if not source.lower().endswith(".csv"):
            raise InputError(f"{source!r} is neither a folder nor a CSV file")
        splits = read_csv(source, make_options(source, {"csv": os.path.abspath(source)}), "")
        query, gallery = ([Entry(*row) for row in split] for split in (splits.query, splits.gallery))
        if not query and not gallery:
            raise InputError(f"{source!r} lists no image with the split query or gallery")
        return Images(query, gallery)
    if not os.path.isdir(source):
        raise InputError(f"{source!r} does not exist: give a folder of images, or a CSV file")
    layout = [name for name in _GALLERY if os.path.isdir(os.path.join(source, name))]
    if layout and os.path.isdir(os.path.join(source, _QUERY)):
        asked, images = (list_folder(os.path.join(source, name)) for name in (_QUERY, layout[0]))
        return Images(asked.gallery, images.gallery, asked.ignored + images.ignored)
    images = list_folder(source)
    name = Path(source).absolute().name
    if name == _QUERY:
        return Images(images.gallery, [], images.ignored)
    if name not in _GALLERY and all(entry.identity and entry.camera for entry in images.gallery):
        first = {(entry.identity, entry.camera): entry for entry in reversed(images.gallery)}
        images.query = [entry for entry in images.gallery if first[entry.identity, entry.camera] is entry]
    return images


def list_folder(folder: str) -> Images:
    """All images below a folder, in the order of their names, as gallery images.

    The name of the folder itself is no identity: it is the folder of a whole collection.

    Raises:
        InputError: if the folder is missing or has no image.
    """
    if not os.path.isdir(folder):
        raise InputError(f"there is no folder {folder!r}")
    images = Images()
    for name in walk(Path(folder)):
        if name.lower().endswith(SUFFIXES):
            entry = named(str(Path(folder, name)), name)
            if entry.identity != _LEFT_OUT:
                images.gallery.append(entry)
        else:
            images.ignored.append(name)
    if not images.gallery:
        raise InputError(f"there is no image below {folder!r}: names of images end in {' '.join(SUFFIXES)}")
    return images


def test_images(config: Config) -> Images:
    """The query and the gallery on which a run's first target is tested, in the order of the run's test.

    Raises:
        InputError: for a target of video, or one that is not found.
    """
    target, root = config.data.targets[0], config.data.root
    if config.data.type != "image":
        raise InputError(f"target {target!r} is of video: give the folder of its images instead")
    register_datasets(config.datasets)
    try:
        with without_empty_folders(Path(root)):
            dataset: Any = torchreid.data.datasets.init_image_dataset(
                target, root=root, split_id=config.data.split_id, mode="query", verbose=False
            )
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot read {target!r} below {root!r}: {error}. Give its folder or CSV file") from error

    def entries(items: Iterable[Any]) -> list[Entry]:
        return [Entry(item[0], str(item[1]), str(item[2])) for item in items]

    return Images(entries(dataset.query), entries(dataset.gallery))
