"""Lists the images that the commands are given, and those on which a run was tested."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torchreid

from pml_drsl.checks import InputError
from torchreid_ext import images
from torchreid_ext.config import build
from torchreid_ext.data.datasets import register_datasets, without_empty_folders
from torchreid_ext.images import Row, Table, read_csv, with_queries
from torchreid_ext.pixels import SUFFIXES as SUFFIXES


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


def _entries(rows: Sequence[Row]) -> list[Entry]:
    return [Entry(*row[:3]) for row in rows]


def _images(table: Table) -> Images:
    return Images(_entries(table.query), _entries(table.gallery), table.left_out.get(images.NO_IMAGES, []))


def named(path: str, names: str = "market") -> Entry:
    """An image with the identity and the camera in its path; see :func:`torchreid_ext.images.named`."""
    return Entry(*images.named(path, images.pattern(names, "--names"))[:3])


def list_images(sources: Sequence[str], names: str = "market") -> Images:
    """The test images of folders and CSV files together; see :func:`list_table`."""
    return _images(list_table(sources, names))


def list_folder(folder: str, names: str = "market") -> Images:
    """All images below a folder as gallery; see :func:`torchreid_ext.images.list_folder`."""
    return _images(images.list_folder(folder, images.pattern(names, "--names")))


def list_table(sources: Sequence[str], names: str = "market") -> Table:
    """The test images of folders and CSV files together.

    A CSV file is as :func:`torchreid_ext.images.read_csv` reads it; its training images are left out. A folder may have
    Market-1501's layout (``query`` and ``bounding_box_test``), or be one of these two, or hold images in any folders
    below it. Where the identity and the camera of every such image are known, the first of each identity and camera is
    a query too.

    Args:
        sources: folders and CSV files.
        names: how names carry identities and cameras; see :func:`torchreid_ext.images.pattern`.

    Raises:
        InputError: for a source that is missing, has no image, or names an image as another source does.
    """
    carried = images.pattern(names, "--names")
    table, origin = Table(), dict[tuple[str, str], str]()
    for source in sources:
        found = _listed(source, carried)
        for row in found.rows:
            name = os.path.relpath(row.path, source if os.path.isdir(source) else os.path.dirname(source))
            other = origin.setdefault((row.split, name), source)
            if other is not source:
                raise InputError(
                    f"{other!r} and {source!r} both have a {row.split} image {name!r}, so their identities cannot be "
                    f"told apart: give each folder by itself, or put both below one folder and give that one"
                )
        table.rows += found.rows
        table.leave_out_all(found)
    return table


# The folders of Market-1501's layout; DukeMTMC-reID and the drawn pedestrians have the same.
_QUERY, _GALLERY = "query", ("bounding_box_test", "gallery")


def _listed(source: str, names: re.Pattern[str]) -> Table:
    if os.path.isfile(source):
        if not source.lower().endswith(".csv"):
            raise InputError(f"{source!r} is neither a folder nor a CSV file")
        table = read_csv(os.path.abspath(source))
        table.rows = [row for row in table.rows if row.split != "train"]
        if not table.rows:
            raise InputError(f"{source!r} lists no image with the split query or gallery")
        return table
    if not os.path.isdir(source):
        raise InputError(f"{source!r} does not exist: give a folder of images, or a CSV file")
    layout = [name for name in _GALLERY if os.path.isdir(os.path.join(source, name))]
    if layout and os.path.isdir(os.path.join(source, _QUERY)):
        query, table = (images.list_folder(os.path.join(source, name), names) for name in (_QUERY, layout[0]))
        query.rows = [row._replace(split="query") for row in query.rows] + table.rows
        query.leave_out_all(table)
        return query
    table = images.list_folder(source, names)
    name = Path(source).absolute().name
    if name == _QUERY:
        table.rows = [row._replace(split="query") for row in table.rows]
    elif name not in _GALLERY and all(row.identity and row.camera for row in table.rows):
        table.rows = with_queries(table.rows)
    return table


def test_images(config: build.Config) -> Images:
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
    return _images(images.from_torchreid(dataset))
