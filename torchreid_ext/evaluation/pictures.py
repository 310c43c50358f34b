"""Draws pictures of search results: each query with its nearest gallery entries, marked as right or wrong."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from pml_drsl.checks import InputError
from torchreid_ext.evaluation.page import Picture, Ranking, shown_distance, tiled
from torchreid_ext.pixels import read_image

# Some people cannot distinguish green and red, so the word is below each image too.
FRAMES = {"right": (0, 148, 104), "wrong": (206, 32, 48), "junk": (120, 120, 120), "query": (34, 34, 34)}
# In pixels. A cell has an image with its frame, two lines of text, which hold any distance, and a gap.
IMAGE, FRAME, CELL, MARGIN, HEADER = (96, 192), 5, (118, 254), 24, 64


def _cell(picture: Picture, kind: str, caption: str) -> Image.Image:
    image = tiled([read_image(file) for file in picture.shown], IMAGE)
    image = ImageOps.grayscale(image).convert("RGB") if kind == "junk" else image
    cell = Image.new("RGB", CELL, "white")
    cell.paste(ImageOps.expand(image, FRAME, FRAMES[kind]))
    ImageDraw.Draw(cell).text((0, IMAGE[1] + 2 * FRAME + 2), caption, FRAMES[kind], ImageFont.load_default(15))
    return cell


def ranking_picture(rows: Sequence[Ranking], title: str) -> Image.Image:
    """Draws an RGB page with a row for each query: the query at the left, then its gallery entries in rank order.

    A right match has a green frame, a wrong one a red frame. Its mark, rank and distance are below each image. Junk is
    grey, and has no rank. The numbers of matches, which are all marked, may differ. A title wider than the page is cut.
    Raises InputError if there are no rows, or an image cannot be read."""
    if not rows:
        raise InputError("rows is empty: give at least one Ranking")
    columns = 1 + max(len(row.matches) for row in rows)
    page = Image.new("RGB", (max(2 * MARGIN + columns * CELL[0], 480), HEADER + len(rows) * CELL[1]), "white")
    ImageDraw.Draw(page).text((MARGIN, MARGIN), title, FRAMES["query"], ImageFont.load_default(20), anchor="lt")
    for line, row in enumerate(rows):
        cells = [_cell(row.query, "query", "query")]
        for found in row.matches:
            name = found.mark if found.mark == "junk" else f"{found.mark} {found.rank}"
            cells.append(_cell(found.picture, found.mark, f"{name}\n{shown_distance(found.distance)}"))
        for column, cell in enumerate(cells):
            # A gap sets the query apart.
            page.paste(cell, (MARGIN + column * CELL[0] + 12 * (column > 0), HEADER + line * CELL[1]))
    return page
