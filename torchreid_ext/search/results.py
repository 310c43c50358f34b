"""The result of a search: as rankings for the page, as text for a terminal and as JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torchreid_ext.evaluation.page import Box, Found, Picture, Ranking, number
from torchreid_ext.images import Row
from torchreid_ext.search.gallery import shown
from torchreid_ext.search.searcher import Match, Searcher

_SAME: dict[str, bool | None] = {"right": True, "wrong": False, "": None}
_WORDS = {"right": "same", "wrong": "other", "": ""}


def rankings(queries: Sequence[Row], crop: Box | None, found: Sequence[Sequence[Match]]) -> list[Ranking]:
    """The queries with what a search found.

    A match is marked right or wrong only where the identities of the query and of the match are both known.

    Args:
        queries: Q query images.
        crop: the part of each query that was used; None for the whole image.
        found: the matches of each query, nearest first.
    """
    rows = []
    for query, matches in zip(queries, found, strict=True):
        entries = []
        for match in matches:
            known = bool(query.identity and match.identity)
            mark = ("right" if query.identity == match.identity else "wrong") if known else ""
            entries.append(Found(Picture(match.name, match.identity, match.camera), match.distance, mark))
        rows.append(Ranking(Picture(query.path, query.identity, query.camera, crop), entries))
    return rows


def caption(searcher: Searcher, rerank: bool) -> str:
    """What was searched and by which distance, in a sentence."""
    kind = {"euclidean": "squared Euclidean distance", "cosine": "cosine distance"}[searcher.model.metric]
    ranked = " after re-ranking by k-reciprocal neighbours" if rerank else ""
    return f"{len(searcher):,} gallery images, ranked by {kind}{ranked}"


def as_text(rows: Sequence[Ranking]) -> str:
    """A table for each query: rank, distance, and, where they are known, identity and camera."""
    blocks = []
    for row in rows:
        about = ", ".join(filter(None, _about(row.query)))
        lines = [f"query {_line(row.query)}" + (f" ({about})" if about else "")]
        cells = [
            [str(rank), number(found.distance), _WORDS[found.mark], *_about(found.picture)]
            for rank, found in enumerate(row.matches, 1)
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for found, line in zip(row.matches, cells, strict=True):
            columns = [cell.rjust(width) for cell, width in zip(line, widths, strict=True) if width]
            lines.append("  ".join(["", *columns, _line(found.picture)]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_dict(searcher: Searcher, rows: Sequence[Ranking], rerank: bool) -> dict[str, Any]:
    """The same as plain values; ``same_identity`` is null where the identity of one of the two is unknown."""
    return {
        "checkpoint": os.path.abspath(searcher.model.path),
        "model_fingerprint": searcher.model.fingerprint,
        "metric": searcher.model.metric,
        "reranked": rerank,
        "gallery": len(searcher),
        "queries": [
            {
                "path": row.query.path,
                "identity": row.query.identity,
                "camera": row.query.camera,
                "crop": row.query.crop,
                "matches": [
                    {
                        "rank": rank,
                        "path": found.picture.path,
                        "distance": found.distance,
                        "identity": found.picture.identity,
                        "camera": found.picture.camera,
                        "same_identity": _SAME[found.mark],
                    }
                    for rank, found in enumerate(row.matches, 1)
                ],
            }
            for row in rows
        ],
    }


def _line(picture: Picture) -> str:
    # A name may hold the end of a line.
    return shown(picture.path).replace("\n", "\\n")


def _about(picture: Picture) -> list[str]:
    names = ("identity", picture.identity), ("camera", picture.camera)
    return [f"{name} {value}" if value else "" for name, value in names]
