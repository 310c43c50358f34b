"""Draws pictures of search results: each query with its nearest gallery entries, and a mark for right or wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from pml_drsl.checks import InputError
from torchreid_ext.pixels import read_image
from torchreid_ext.runtime.files import replacing

Colour = tuple[int, int, int]
Entry = str | Sequence[str]

# Some people cannot distinguish these two colours, so each image also has a tick or a cross.
RIGHT: Colour = (0, 148, 104)
WRONG: Colour = (206, 32, 48)
INK: Colour = (34, 34, 34)
FAINT: Colour = (110, 110, 110)
PAPER: Colour = (255, 255, 255)
JUNK: Colour = (190, 190, 190)

_IMAGE = (96, 192)
_FRAME, _GAP, _MARGIN, _CAPTION, _HEADER = 5, 12, 24, 24, 64
_QUERY_GAP = 40
_MARK = 13
_TRACKLET_IMAGES = 4  # one in each quarter of a cell


@dataclass(frozen=True)
class RankedQuery:
    """A query and its nearest gallery entries, in the order of distance.

    An entry is the path of an image, or the paths of the images of a tracklet.

    Attributes:
        query: the query entry.
        gallery: K gallery entries, in rank order.
        correct: K truth values. True: the entry shows the identity of the query.
        distances: K distances from the query.
        junk: K truth values. True: evaluation ignores the entry, which has the identity and the camera of the query.
            An empty sequence means that there is no junk.

    Raises:
        InputError: if the sequences differ in length.
    """

    query: Entry
    gallery: Sequence[Entry]
    correct: Sequence[bool]
    distances: Sequence[float]
    junk: Sequence[bool] = ()

    def __post_init__(self) -> None:
        lengths = len(self.gallery), len(self.correct), len(self.distances)
        if len({*lengths, len(self.junk) or len(self.gallery)}) != 1:
            raise InputError(f"gallery, correct, distances and junk must have one length, but have {lengths}")

    @property
    def cells(self) -> list[tuple[Entry, bool, float, bool]]:
        """The gallery as (entry, correct, distance, junk)."""
        junk = self.junk or [False] * len(self.gallery)
        return list(zip(self.gallery, self.correct, self.distances, junk, strict=True))


def _paste(page: Image.Image, entry: Entry, left: int, top: int, frame: Colour, grey: bool = False) -> None:
    """Pastes an entry with a frame into a cell. ``left`` and ``top`` are the corner of the frame."""
    paths = [entry] if isinstance(entry, str) else _spread(entry, _TRACKLET_IMAGES)
    columns = 2 if len(paths) > 1 else 1
    size = _IMAGE[0] // columns, _IMAGE[1] // columns
    cell = Image.new("RGB", _IMAGE, (236, 236, 236))
    for number, path in enumerate(paths):
        fitted = ImageOps.pad(read_image(path), size, Image.Resampling.LANCZOS, color=(236, 236, 236))
        cell.paste(fitted, (number % columns * size[0], number // columns * size[1]))
    if grey:
        cell = Image.blend(ImageOps.grayscale(cell).convert("RGB"), Image.new("RGB", _IMAGE, PAPER), 0.5)
    page.paste(ImageOps.expand(cell, _FRAME, frame), (left, top))


def _spread(paths: Sequence[str], most: int) -> list[str]:
    """Returns at most ``most`` of the paths, evenly spread."""
    count = min(most, len(paths))
    return [paths[number * len(paths) // count] for number in range(count)]


def _rounded(distance: float) -> str:
    """A distance with three places; a negative one that rounds to zero has no sign."""
    return f"{round(distance, 3) + 0.0:.3f}"


def _mark(draw: ImageDraw.ImageDraw, right: int, top: int, correct: bool) -> None:
    """Draws a tick or a cross on a disc. ``right`` and ``top`` are edges of the disc."""
    x, y = right - _MARK, top + _MARK
    draw.ellipse((x - _MARK, y - _MARK, x + _MARK, y + _MARK), fill=RIGHT if correct else WRONG, outline=PAPER, width=2)
    if correct:
        draw.line([(x - 6, y), (x - 2, y + 5), (x + 6, y - 5)], fill=PAPER, width=3, joint="curve")
    else:
        draw.line([(x - 5, y - 5), (x + 5, y + 5)], fill=PAPER, width=3)
        draw.line([(x - 5, y + 5), (x + 5, y - 5)], fill=PAPER, width=3)


def ranking_picture(rows: Sequence[RankedQuery], title: str) -> Image.Image:
    """Draws one page with a row for each query: the query at the left, then its gallery entries in rank order.

    A right match has a green frame and a tick, a wrong match has a red frame and a cross. Rank and distance are below
    each image. Junk is grey, and has no mark and no rank.

    Args:
        rows: one or more ranked queries. Their galleries may differ in length.
        title: the first line of the page. It is shortened if it is wider than the page.

    Returns:
        An RGB image.

    Raises:
        InputError: if there are no rows.
        OSError: if an image cannot be read.
    """
    if not rows:
        raise InputError("rows is empty: give at least one RankedQuery")
    cell_width, cell_height = _IMAGE[0] + 2 * _FRAME, _IMAGE[1] + 2 * _FRAME
    row_height = cell_height + _CAPTION + _GAP
    longest = max(len(row.gallery) for row in rows)
    width = max(2 * _MARGIN + cell_width + _QUERY_GAP + longest * (cell_width + _GAP) - _GAP, 480)
    page = Image.new("RGB", (width, _HEADER + len(rows) * row_height + _MARGIN - _GAP), PAPER)
    draw = ImageDraw.Draw(page)
    heading, caption = ImageFont.load_default(20), ImageFont.load_default(13)

    while draw.textlength(title, heading) > width - 2 * _MARGIN and len(title) > 1:
        title = title.removesuffix("…")[:-1] + "…"
    draw.text((_MARGIN, _MARGIN), title, INK, heading, anchor="lt")
    for number, row in enumerate(rows):
        top = _HEADER + number * row_height
        below = top + cell_height + 6
        _paste(page, row.query, _MARGIN, top, INK)
        draw.text((_MARGIN + cell_width // 2, below), "query", INK, caption, anchor="mt")
        line = _MARGIN + cell_width + _QUERY_GAP // 2
        draw.line([(line, top), (line, top + cell_height)], fill=(200, 200, 200), width=1)
        rank = 0
        for column, (entry, correct, distance, junk) in enumerate(row.cells):
            left = _MARGIN + cell_width + _QUERY_GAP + column * (cell_width + _GAP)
            rank += not junk
            _paste(page, entry, left, top, JUNK if junk else RIGHT if correct else WRONG, grey=junk)
            if not junk:
                _mark(draw, left + cell_width + 4, top - 4, bool(correct))
            draw.text((left, below), "junk" if junk else f"{rank}", FAINT if junk else INK, caption, anchor="lt")
            draw.text((left + cell_width, below), _rounded(distance), FAINT, caption, anchor="rt")
    return page


def save_ranking_picture(path: str | os.PathLike[str], rows: Sequence[RankedQuery], title: str) -> Path:
    """Draws a page with :func:`ranking_picture`, and saves it atomically as a PNG.

    Args:
        path: the PNG to write. Its folder is created if it is missing.
        rows: the rows of :func:`ranking_picture`.
        title: the title of :func:`ranking_picture`.

    Returns:
        ``path``.

    Raises:
        InputError: if there are no rows.
        OSError: if an image cannot be read or the page not be written.
    """
    with replacing(path) as file:
        ranking_picture(rows, title).save(file, "PNG")
    return Path(path)
