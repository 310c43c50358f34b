"""A page of ranked results for people to look at: each query with its gallery in order, right and wrong marked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

Colour = tuple[int, int, int]

# Not everybody can tell these two apart, which is why each image also carries a tick or a cross.
RIGHT: Colour = (0, 148, 104)
WRONG: Colour = (206, 32, 48)
INK: Colour = (34, 34, 34)
FAINT: Colour = (110, 110, 110)
PAPER: Colour = (255, 255, 255)

_IMAGE = (96, 192)
_FRAME, _GAP, _MARGIN, _CAPTION, _HEADER = 5, 12, 24, 24, 64
_QUERY_GAP = 40
_MARK = 13


@dataclass(frozen=True)
class RankedQuery:
    """A query and the gallery images nearest to it, nearest first.

    Leave out what evaluation leaves out: gallery images of the query's identity from the query's camera.

    Attributes:
        query: path of the query image.
        gallery: paths of K gallery images, in rank order.
        correct: K truth values: whether the image shows the query's identity.
        distances: K distances from the query.

    Raises:
        ValueError: if the three sequences differ in length.
    """

    query: str
    gallery: Sequence[str]
    correct: Sequence[bool]
    distances: Sequence[float]

    def __post_init__(self) -> None:
        lengths = len(self.gallery), len(self.correct), len(self.distances)
        if len(set(lengths)) != 1:
            raise ValueError(f"gallery, correct and distances must have one length, but have {lengths}")


def _paste(page: Image.Image, path: str, left: int, top: int, frame: Colour) -> None:
    """Pastes an image, fitted to the cell and framed, with the cell's top left corner (frame included) given."""
    with Image.open(path) as image:
        fitted = ImageOps.pad(image.convert("RGB"), _IMAGE, Image.Resampling.LANCZOS, color=(236, 236, 236))
    page.paste(ImageOps.expand(fitted, _FRAME, frame), (left, top))


def _mark(draw: ImageDraw.ImageDraw, right: int, top: int, correct: bool) -> None:
    """Draws a tick or a cross on a disc, its box ending at ``right`` and beginning at ``top``."""
    x, y = right - _MARK, top + _MARK
    draw.ellipse((x - _MARK, y - _MARK, x + _MARK, y + _MARK), fill=RIGHT if correct else WRONG, outline=PAPER, width=2)
    if correct:
        draw.line([(x - 6, y), (x - 2, y + 5), (x + 6, y - 5)], fill=PAPER, width=3, joint="curve")
    else:
        draw.line([(x - 5, y - 5), (x + 5, y + 5)], fill=PAPER, width=3)
        draw.line([(x - 5, y + 5), (x + 5, y - 5)], fill=PAPER, width=3)


def ranking_picture(rows: Sequence[RankedQuery], title: str) -> Image.Image:
    """Draws one page: a row per query, the query at left, then its gallery in rank order.

    A right match has a green frame and a tick, a wrong one a red frame and a cross; below stand rank and distance.

    Args:
        rows: one or more ranked queries; their galleries may differ in length.
        title: the page's first line; a longer one than the page is wide is shortened.

    Returns:
        An RGB image.

    Raises:
        ValueError: if there are no rows.
        OSError: if an image cannot be read.
    """
    if not rows:
        raise ValueError("rows is empty: give at least one RankedQuery")
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
        for rank, (path, correct, distance) in enumerate(zip(row.gallery, row.correct, row.distances, strict=True), 1):
            left = _MARGIN + cell_width + _QUERY_GAP + (rank - 1) * (cell_width + _GAP)
            _paste(page, path, left, top, RIGHT if correct else WRONG)
            _mark(draw, left + cell_width + 4, top - 4, bool(correct))
            draw.text((left, below), f"{rank}", INK, caption, anchor="lt")
            draw.text((left + cell_width, below), f"{distance:.3f}", FAINT, caption, anchor="rt")
    return page


def save_ranking_picture(path: str | os.PathLike[str], rows: Sequence[RankedQuery], title: str) -> Path:
    """Draws :func:`ranking_picture` and saves it as PNG; a reader finds the old file or the new one, never half of it.

    Args:
        path: the PNG to write; its folder is created where it is missing.
        rows: as for :func:`ranking_picture`.
        title: likewise.

    Returns:
        ``path``.

    Raises:
        ValueError: if there are no rows.
        OSError: if an image cannot be read or the page not be written.
    """
    page, target = ranking_picture(rows, title), Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        page.save(Path(temporary, "page.png"))
        os.replace(Path(temporary, "page.png"), target)
    return target
