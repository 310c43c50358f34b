"""Draws pictures of search results: each query with its nearest gallery entries, and a mark for right or wrong."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from pml_drsl.checks import InputError
from torchreid_ext.evaluation.page import Picture, Ranking, tiled
from torchreid_ext.pixels import read_image

Colour = tuple[int, int, int]

# Some people cannot distinguish these two colours, so each image also has a tick or a cross.
RIGHT: Colour = (0, 148, 104)
WRONG: Colour = (206, 32, 48)
INK: Colour = (34, 34, 34)
FAINT: Colour = (110, 110, 110)
PAPER: Colour = (255, 255, 255)
FRAMES = {"right": RIGHT, "wrong": WRONG, "junk": (190, 190, 190), "query": INK}

_IMAGE = (96, 192)
_FRAME, _GAP, _MARGIN, _CAPTION, _HEADER = 5, 12, 24, 24, 64
_CELL = (_IMAGE[0] + 2 * _FRAME, _IMAGE[1] + 2 * _FRAME)
_QUERY_GAP, _MARK = 40, 13


def _paste(page: Image.Image, picture: Picture, left: int, top: int, kind: str) -> None:
    cell = tiled([read_image(file) for file in picture.shown], _IMAGE)
    if kind == "junk":
        cell = Image.blend(ImageOps.grayscale(cell).convert("RGB"), Image.new("RGB", _IMAGE, PAPER), 0.5)
    page.paste(ImageOps.expand(cell, _FRAME, FRAMES[kind]), (left, top))


def _mark(draw: ImageDraw.ImageDraw, right: int, top: int, kind: str) -> None:
    x, y = right - _MARK, top + _MARK  # A tick or a cross on a disc with these edges.
    draw.ellipse((x - _MARK, y - _MARK, x + _MARK, y + _MARK), fill=FRAMES[kind], outline=PAPER, width=2)
    if kind == "right":
        draw.line([(x - 6, y), (x - 2, y + 5), (x + 6, y - 5)], fill=PAPER, width=3, joint="curve")
    else:
        draw.line([(x - 5, y - 5), (x + 5, y + 5)], fill=PAPER, width=3)
        draw.line([(x - 5, y + 5), (x + 5, y - 5)], fill=PAPER, width=3)


def ranking_picture(rows: Sequence[Ranking], title: str) -> Image.Image:
    """Draws an RGB page with a row for each query: the query at the left, then its gallery entries in rank order.

    A right match has a green frame and a tick, a wrong one a red frame and a cross. Rank and distance are below each
    image. Junk is grey, and has no mark and no rank. The numbers of matches, which are all marked, may differ. A title
    wider than the page is shortened. Raises InputError if there are no rows, or an image cannot be read."""
    if not rows:
        raise InputError("rows is empty: give at least one Ranking")
    row_height = _CELL[1] + _CAPTION + _GAP
    longest = max(len(row.matches) for row in rows)
    width = max(2 * _MARGIN + _CELL[0] + _QUERY_GAP + longest * (_CELL[0] + _GAP) - _GAP, 480)
    page = Image.new("RGB", (width, _HEADER + len(rows) * row_height + _MARGIN - _GAP), PAPER)
    draw = ImageDraw.Draw(page)
    heading, caption = ImageFont.load_default(20), ImageFont.load_default(13)
    while draw.textlength(title, heading) > width - 2 * _MARGIN and len(title) > 1:
        title = title.removesuffix("…")[:-1] + "…"
    draw.text((_MARGIN, _MARGIN), title, INK, heading, anchor="lt")
    for number, row in enumerate(rows):
        top = _HEADER + number * row_height
        below = top + _CELL[1] + 6
        _paste(page, row.query, _MARGIN, top, "query")
        draw.text((_MARGIN + _CELL[0] // 2, below), "query", INK, caption, anchor="mt")
        line = _MARGIN + _CELL[0] + _QUERY_GAP // 2
        draw.line([(line, top), (line, top + _CELL[1])], fill=(200, 200, 200), width=1)
        for column, found in enumerate(row.matches):
            left = _MARGIN + _CELL[0] + _QUERY_GAP + column * (_CELL[0] + _GAP)
            _paste(page, found.picture, left, top, found.mark)
            if found.mark == "junk":
                draw.text((left, below), "junk", FAINT, caption, anchor="lt")
            else:
                _mark(draw, left + _CELL[0] + 4, top - 4, found.mark)
                draw.text((left, below), str(found.rank), INK, caption, anchor="lt")
            # Zero is added, because a negative distance that rounds to zero has a sign.
            distance = f"{round(found.distance, 3) + 0.0:.3f}"
            draw.text((left + _CELL[0], below), distance, FAINT, caption, anchor="rt")
    return page
