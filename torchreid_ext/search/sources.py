"""Lists the images that the commands are given, and those on which a run was tested."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torchreid

from pml_drsl.checks import InputError
from torchreid_ext import images
from torchreid_ext.config import Config, build_datamanager
from torchreid_ext.config.data import image_options, input_errors, own_images, person
from torchreid_ext.config.run import check_unseen
from torchreid_ext.data.datasets import register_datasets
from torchreid_ext.images import Row, Table

DEFAULT_NAMES = "market"  # how names carry identities and cameras by default: see ``torchreid_ext.images.pattern``
# The folders of Market-1501's layout; DukeMTMC-reID and the drawn pedestrians have the same.
_QUERY, _GALLERY = "query", ("bounding_box_test", "gallery")


def resolved(path: str) -> str:
    """The absolute path of a file below the true names of its folders; the file itself may be a link."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def absolute(entry: Row) -> Row:
    """The same image with its absolute path, as :func:`resolved` gives it."""
    return entry._replace(path=resolved(entry.path))


def shown(path: str) -> str:
    """A path as a user would type it: relative to the current folder where it is below it."""
    try:
        relative = os.path.relpath(path) if os.path.isabs(path) else path
    except ValueError:  # The two are on different drives of Windows.
        return path
    return path if relative.startswith("..") else relative


def list_sources(sources: Sequence[str], names: str = DEFAULT_NAMES, cameras: bool = True) -> Table:
    """The test images of folders, CSV files and image files together, named as ``torchreid_ext.images.pattern`` says.

    A CSV file, of :func:`torchreid_ext.images.read_csv`, gives its test images; it may lack cameras. A folder may have
    Market-1501's layout (``query`` and ``bounding_box_test``), be one of these two, or hold images in any folders below
    it. Where the identities of all such images are known, the first of each identity and camera is a query too; an
    image whose camera is not known has one of its own. An image file is of the gallery. Without ``cameras``, no camera
    is known. One identity in several sources is one person. An image and the links to it count once: the first that
    knows whom it shows, folders and CSV files before image files. Raises InputError for a source that is missing
    or has no image."""
    carried = images.pattern(names, "--names")
    table, kept, known = Table(), dict[tuple[str, str], None](), dict[str, Row]()
    for source in sorted(dict.fromkeys(sources), key=images.is_image):
        found = _listed(source, carried, cameras)
        for row in found.rows:
            real = os.path.realpath(row.path)
            kept[row.split, real] = None
            if not known.setdefault(real, row).identity and row.identity:
                known[real] = row
        table.leave_out_all(found)
    rows = (known[real]._replace(split=split) for split, real in kept)
    table.rows = [row if cameras else row._replace(camera="") for row in rows]
    return table


def list_queries(sources: Sequence[str], names: str = DEFAULT_NAMES) -> Table:
    """Query images: image files, all images of folders, and the query images of CSV files. The identity of an image is
    in its path below the folder that was given, or in the name of a file; the folders above say nothing of it. Raises
    InputError for a source that is missing, a folder without an image, or a CSV file that cannot be read."""
    carried, table = images.pattern(names, "--names"), Table()
    for source in sources:
        if source.lower().endswith(".csv"):
            found = _listed(source, carried)
            found.rows = found.query or found.gallery
        elif os.path.isdir(source):
            found = images.list_folder(source, carried)
        else:
            images.check_exists(source)
            found = Table([Row(source, *(images.in_name(carried, os.path.basename(source)) or ()))])
        table.rows += found.rows
        table.leave_out_all(found)
    return table


def _listed(source: str, names: re.Pattern[str], cameras: bool = True) -> Table:
    if os.path.isfile(source):
        if images.is_image(source):
            return Table([images.named(os.path.abspath(source), names)._replace(path=source, split="gallery")])
        if not source.lower().endswith(".csv"):
            raise InputError(f"{source!r} is neither a folder, nor an image, nor a CSV file: {images.KINDS}")
        table = images.read_csv(os.path.abspath(source), None if cameras else False)
        for row in table.of("train"):
            table.leave_out("images of the split train", row.path)
        table.rows = [row for row in table.rows if row.split != "train"]
        if not table.rows:
            raise InputError(f"{source!r} lists no image with the split query or gallery")
        return table
    images.check_exists(source)
    layout = [name for name in _GALLERY if os.path.isdir(os.path.join(source, name))]
    if layout and os.path.isdir(os.path.join(source, _QUERY)):
        query, table = (images.list_folder(os.path.join(source, name), names) for name in (_QUERY, layout[0]))
        query.rows = [row._replace(split="query") for row in query.rows] + table.rows
        query.leave_out_all(table)
        for name in sorted({*os.listdir(source)} - {_QUERY, layout[0]}):
            if not images.is_hidden(name):
                query.leave_out(f"what is beside the folders {_QUERY} and {layout[0]}", name)
        return query
    table = images.list_folder(source, names)
    name = Path(source).absolute().name
    if name == _QUERY:
        table.rows = [row._replace(split="query") for row in table.rows]
    elif name not in _GALLERY and all(row.identity for row in table.rows):
        rows = [row if cameras else row._replace(camera="") for row in table.rows]
        table.rows = images.queries(rows) + rows
    return table


_OTHERS = "or give other photos, by --gallery to drsl-search, or as a SOURCE to drsl-extract"


def _check_there(config: Config, name: str) -> None:
    """Raises InputError if torchreid would download or draw a data set, because its folder is missing."""
    kind = vars(torchreid.data.datasets)["__image_datasets"].get(name)
    drawn = name if name == "synthetic_pedestrians" else ""  # which is registered by a function
    folder = Path(config.data.root, getattr(kind, "dataset_dir", drawn) or "").expanduser()
    if (drawn or getattr(kind, "__module__", "").startswith("torchreid.")) and not folder.is_dir():
        missing = f"the images of {name} are not there: {str(folder)!r} is no folder"
        raise InputError(f"{missing}. Say with --root where the data of the run are, {_OTHERS}")


def test_images(config: Config, root: str | None = None, trained: Collection[str] = ()) -> Table:
    """The query and the gallery of a run's own test, in its order: those of the first target, or of the people who were
    held out for validation. The data are below ``root``; None for where the run had them; nothing is downloaded or
    drawn. Raises InputError for a run on video, for data that are not found, and if ``trained``, the people of the
    configured data sets that the run was trained on, are among them (without ``data.allow_overlap``): where photos of
    other people were added or removed, a random split is another one."""
    config, target = config.clone(), config.data.targets[0]
    if config.data.type != "image":
        command = "drsl-train --config-file RUN/config.yaml model.resume auto test.evaluate True test.visrank True"
        about = f"the run was tested on tracklets of {target!r}, and this command reads single images"
        raise InputError(f"{about}; {command} shows the rankings of the tracklets; {_OTHERS}")
    config.data.root = root or config.data.root
    config.test.evaluate = True  # The loss is not built here, and need not be installed.
    for name in config.data.sources if config.data.validation else [target]:
        _check_there(config, name)
    if config.data.validation:
        with contextlib.redirect_stdout(io.StringIO()):  # which says how many images the run trained on
            (splits,) = build_datamanager(config).test_loader.values()
        dataset: Any = splits["query"].dataset
    else:
        register_datasets(config.datasets)
        config.data.sources = config.data.targets = [target]  # The others need not be there.
        with input_errors(config):
            options = image_options(config)
            dataset = torchreid.data.datasets.init_image_dataset(target, mode="query", verbose=False, **options)
    table = images.from_torchreid(dataset)
    table.rows = table.query + table.gallery
    own = own_images(config, config.data.sources)
    if not own:
        table.rows = images.spelt(table.rows)
    tested = {person(*own[row.path]): own[row.path] for row in table.rows if row.path in own}
    changed = "the photos have changed since, and with them the random split. To test, bring the photos back"
    cure = f"{changed} as they were; {_OTHERS}"
    check_unseen(config, tested, trained, "the run", cure)
    # A data manager has numbers in place of names. One name in two data sets is two people.
    sets = Counter(image.identity for _, image in tested.values())
    for number, row in enumerate(table.rows):
        if row.path in own:
            owner, image = own[row.path]
            name = person(owner, image) if sets[image.identity] > 1 else image.identity
            table.rows[number] = image._replace(identity=name, split=row.split)
    return table
