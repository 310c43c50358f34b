"""Shows ranked galleries: as web pages that need no other file and no network, and on one picture."""

from __future__ import annotations

import base64
import io
import os
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from pml_drsl.checks import InputError
from pml_drsl.console import replacing
from torchreid_ext.pixels import read_image

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of an image in pixels, right and bottom excluded."""

THUMBNAIL = (256, 512)  # twice the size at which the page shows a picture, for screens with many pixels
EMPTY = (236, 236, 236)  # the colour beside an image that does not fill its place
QUERIES_PER_PAGE = 100  # More are written on several pages, because every page holds its own pictures.
UNITS = {"euclidean": "squared Euclidean distance", "cosine": "cosine distance"}
_MARKS = {
    "right": ("✓", "same identity"),
    "wrong": ("✗", "another identity"),
    "junk": ("-", "same identity and camera, left out"),
}

# Some people cannot distinguish green and red, so the word is below each image too.
FRAMES = {"right": (0, 148, 104), "wrong": (206, 32, 48), "junk": (120, 120, 120), "query": (34, 34, 34)}
# In pixels. A cell has an image with its frame, two lines of text, which hold any distance, and a gap.
IMAGE, FRAME, CELL, MARGIN, HEADER = (96, 192), 5, (118, 254), 24, 64


@dataclass(frozen=True)
class Picture:
    """An image, or a tracklet of several images, with what is known of it; an unknown identity or camera is empty."""

    files: str | Sequence[str]
    identity: str = ""
    camera: str = ""
    crop: Box | None = None  # the part of the image that counts; None for the whole image
    image: Image.Image | None = None  # its pixels, where no file holds them

    @property
    def path(self) -> str:
        """The image file, or the first one of a tracklet."""
        return self.files if isinstance(self.files, str) else self.files[0]

    @property
    def shown(self) -> list[str]:
        """At most four of the image files, one from each quarter of a tracklet."""
        files = [self.files] if isinstance(self.files, str) else self.files
        count = min(4, len(files))
        return [files[index * len(files) // count] for index in range(count)]


@dataclass(frozen=True)
class Found:
    """An entry of the gallery, as a query found it. Its mark is ``"right"`` or ``"wrong"`` identity, ``"junk"`` that
    evaluation leaves out, or empty where the identity of one of the two is unknown."""

    picture: Picture
    distance: float
    mark: str
    rank: int  # from 1, among the entries that are not junk


@dataclass(frozen=True)
class Ranking:
    """A query and its nearest gallery entries, nearest first."""

    query: Picture
    matches: Sequence[Found]
    note: str = ""  # what the heading says beside the name of the query, for example its average precision


def tiled(images: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    """One image of ``size`` in pixels: an image, or up to four of them in two columns, each as large as it fits."""
    columns = 2 if len(images) > 1 else 1
    cell = size[0] // columns, size[1] // columns
    whole = Image.new("RGB", size, EMPTY)
    for number, image in enumerate(images):
        left, top = number % columns * cell[0], number // columns * cell[1]
        scale = min(cell[0] / image.width, cell[1] / image.height)
        # A line that is a thousand times as long as it is wide keeps a pixel.
        width, height = (max(1, round(scale * side)) for side in image.size)
        fitted = image.resize((width, height), Image.Resampling.LANCZOS)
        whole.paste(fitted, (left + (cell[0] - width) // 2, top + (cell[1] - height) // 2))
    return whole


def write_pages(
    path: str | Path, rankings: Sequence[Ranking], caption: str, title: str = "Search results", figures: str = ""
) -> list[Path]:
    """Writes one or more rankings with all pictures inside, each page whole or not at all, and returns the pages.

    The page ``path`` has the ``caption`` below its title, and below that the ``figures``, which are HTML. From 101
    queries on there are more pages, ``NAME-2.html`` and so on, which link to each other. A picture that cannot be read
    is named on the page. Raises OSError if a page cannot be written."""
    first, count = Path(path), max(1, -(-len(rankings) // QUERIES_PER_PAGE))
    pages = [first, *(first.with_name(f"{first.stem}-{number}{first.suffix}") for number in range(2, count + 1))]
    for number, page in enumerate(pages):
        start = number * QUERIES_PER_PAGE
        body = sections(rankings[start : start + QUERIES_PER_PAGE], start + 1)
        parts = {"HEAD": [_links(pages, number)], "FIGURES": [figures if number == 0 else ""], "BODY": body}
        with replacing(page) as file:
            file.writelines(whole(title, caption, parts))
    return pages


def whole(title: str, caption: str, parts: Mapping[str, Iterable[str]]) -> Iterator[bytes]:
    """A page piece by piece, with its ``HEAD`` and ``BODY``, and in ``POLICY`` what else its browser may load."""
    always = {"POLICY": [], "FIGURES": [], "TITLE": [escape(title)], "CAPTION": [escape(caption)]}
    return filled("evaluation/page.html", {**always, **parts})


def filled(template: str, parts: Mapping[str, Iterable[str]]) -> Iterator[bytes]:
    """The pieces of a file of this package, with the HTML of each part in its place ``%%NAME%%``."""
    # The template is split once, so that the name of a file is never taken for a place in it.
    pieces = resources.files("torchreid_ext").joinpath(template).read_text(encoding="utf-8").split("%%")
    for index, piece in enumerate(pieces):
        for text in parts[piece] if index % 2 else [piece]:
            yield text.encode("utf-8", "backslashreplace")  # A file's name may hold bytes that are no UTF-8.


def shown_distance(distance: float) -> str:
    """A distance with four places; a negative one that rounds to zero has no sign."""
    text = f"{distance:.4f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _links(pages: Sequence[Path], current: int) -> str:
    if len(pages) == 1:
        return ""
    addresses = (urllib.parse.quote(os.fsencode(page.name)) for page in pages)
    links = [f'<a href="{address}">{index}</a>' for index, address in enumerate(addresses, 1)]
    links[current] = f"<b>{current + 1}</b>"
    return f'<nav aria-label="Pages">Page {" ".join(links)}</nav>'


def sections(rankings: Sequence[Ranking], first: int = 1) -> Iterator[str]:
    """The HTML of rankings, whose numbers on their page count from ``first``."""
    for index, row in enumerate(rankings, first):
        note = f" - {escape(row.note)}" if row.note else ""
        yield (
            f'<section aria-labelledby="query{index}">\n<h2 id="query{index}">{escape(Path(row.query.path).name)}{note}'
            f'</h2>\n<div class="row">\n{_card(row.query, "query", "query")}\n<ol>\n'
        )
        for found in row.matches:
            name = "junk" if found.mark == "junk" else str(found.rank)
            yield f"<li>{_card(found.picture, found.mark, name, found.distance)}</li>\n"
        yield "</ol>\n</div>\n</section>\n"


def _card(picture: Picture, kind: str, name: str, distance: float | None = None) -> str:
    sign, words = _MARKS.get(kind, ("", ""))
    known = {"identity": picture.identity, "camera": picture.camera}
    about = [f"{what} {value}" for what, value in known.items() if value]
    if picture.crop:
        about.append("part {}, {} to {}, {}".format(*picture.crop))
    full = picture.path if isinstance(picture.files, str) else f"{picture.path} and {len(picture.files) - 1} more"
    far = "" if distance is None else shown_distance(distance)
    spoken = [f"rank {name}" if name.isdigit() else name, far and f"distance {far}", *about, words]
    label = escape(", ".join(filter(None, [*spoken, Path(picture.path).name])))
    # The end of the path fits below a thumbnail; the enlarged picture shows the whole path.
    paths = ("path short", "/".join(Path(picture.path).parts[-2:])), ("path full", full)
    rows = [_span("line", f"<b>{name}</b>{_span('distance', far)}"), *(_span("about", escape(text)) for text in about)]
    rows += [_span("words", words), *(_span(place, escape(text)) for place, text in paths)]
    return (
        f'<button type="button" class="{f"card {kind}".strip()}" aria-label="{label}">'
        f"{_image(picture)}{_span('mark', sign)}{_span('caption', ''.join(rows))}</button>"
    )


def _span(kind: str, content: str) -> str:
    return f'<span class="{kind}">{content}</span>' if content else ""


def _image(picture: Picture) -> str:
    try:
        images = [picture.image] if picture.image else [read_image(file) for file in picture.shown]
    except InputError:
        # An index may outlive its images, and a name given in Python is no file.
        return '<span class="missing">the picture cannot be read</span>'
    shown = images[0].crop(picture.crop)
    if len(images) > 1:
        shown = tiled(images, THUMBNAIL)
    shown.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}" alt="">'


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
