"""Draws the result of a search as one web page that needs no other file and no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from PIL import Image

from pml_drsl.checks import InputError
from torchreid_ext.data.loading import read_image
from torchreid_ext.search.preprocessing import Box
from torchreid_ext.search.results import Ranked, shown
from torchreid_ext.search.searcher import Match

# Twice the size at which the page shows a picture, for screens with many pixels.
THUMBNAIL = (256, 512)

_MARKS = {True: ("right", "✓", "same identity"), False: ("wrong", "✗", "another identity"), None: ("", "", "")}


def render(rows: Sequence[Ranked], caption: str, title: str = "Search results") -> str:
    """The page, with each query, its ranked gallery, and every picture inside.

    Args:
        rows: the queries, one or more.
        caption: a sentence below the title.
        title: of the page.
    """
    template = resources.files("torchreid_ext.search").joinpath("page.html").read_text(encoding="utf-8")
    body = "\n".join(_section(number, row) for number, row in enumerate(rows, 1))
    # One pass, so that a file's name is never taken for a place in the template.
    parts = {"TITLE": html.escape(title), "CAPTION": html.escape(caption), "BODY": body}
    pieces = template.split("%%")
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def _section(number: int, row: Ranked) -> str:
    name = html.escape(Path(row.query.path).name)
    matches = "\n".join(_card(row, match) for match in row.matches)
    crop = "" if row.crop is None else "part {}, {} to {}, {}".format(*row.crop)
    about = _about(row.query.identity, row.query.camera, crop)
    return f"""<section aria-labelledby="query{number}">
<h2 id="query{number}">{name}</h2>
<div class="row">
<figure class="card query" tabindex="0">{_picture(row.query.path, "query", row.crop)}
<figcaption><b>query</b>{about}{_path(row.query.path)}</figcaption></figure>
<ol>
{matches}
</ol>
</div>
</section>"""


def _card(row: Ranked, match: Match) -> str:
    kind, sign, words = _MARKS[row.same(match)]
    line = f'<span class="line"><b>{match.rank}</b><span class="distance">{match.distance:.4f}</span></span>'
    mark = f'<span class="mark" title="{words}" aria-label="{words}">{sign}</span>' if sign else ""
    return f"""<li><figure class="card {kind}" tabindex="0">{_picture(match.name, f"rank {match.rank}")}{mark}
<figcaption>{line}{_about(match.identity, match.camera)}{_path(match.name)}</figcaption></figure></li>"""


def _about(identity: str, camera: str, more: str = "") -> str:
    words = [f"identity {identity}" if identity else "", f"camera {camera}" if camera else "", more]
    return "".join(f'<span class="about">{html.escape(word)}</span>' for word in words if word)


def _path(path: str) -> str:
    """The end of a path, which fits below a thumbnail, and the whole path, which the enlarged picture shows."""
    short, full = html.escape("/".join(Path(path).parts[-2:])), html.escape(shown(path))
    return f'<span class="path short">{short}</span><span class="path full">{full}</span>'


def _picture(path: str, description: str, crop: Box | None = None) -> str:
    try:
        image = read_image(path)
    except InputError:
        # An index may outlive its images, and a name given in Python is no file.
        return f'<span class="missing">{html.escape(description)}: the picture cannot be read</span>'
    image = image if crop is None else image.crop(crop)
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(description)}">'
