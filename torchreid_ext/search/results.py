"""The result of a search, as text for a terminal and as JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchreid_ext.search.preprocessing import Box
from torchreid_ext.search.searcher import Match, Searcher
from torchreid_ext.search.sources import Entry

_MARKS = {True: "same", False: "other", None: ""}


@dataclass(frozen=True)
class Ranked:
    """A query and its nearest gallery images.

    Attributes:
        query: the query image.
        crop: the part of it that was used; None for the whole image.
        matches: the nearest gallery images, nearest first.
    """

    query: Entry
    crop: Box | None
    matches: list[Match]

    def same(self, match: Match) -> bool | None:
        """Whether a match shows the query's identity, as their names say; None where a name carries no identity."""
        if not self.query.identity or not match.identity:
            return None
        return self.query.identity == match.identity


def caption(searcher: Searcher, rerank: bool) -> str:
    """What was searched and by which distance, in a sentence."""
    kind = {"euclidean": "squared Euclidean distance", "cosine": "cosine distance"}[searcher.model.metric]
    ranked = " after re-ranking by k-reciprocal neighbours" if rerank else ""
    return f"{len(searcher):,} gallery images, ranked by {kind}{ranked}"


def as_text(rows: Sequence[Ranked]) -> str:
    """A table for each query: rank, distance, and, where names carry them, identity and camera."""
    blocks = []
    for row in rows:
        about = ", ".join(filter(None, _about(row.query.identity, row.query.camera)))
        lines = [f"query {shown(row.query.path)}" + (f" ({about})" if about else "")]
        cells = [
            [str(match.rank), f"{match.distance:.4f}", _MARKS[row.same(match)], *_about(match.identity, match.camera)]
            for match in row.matches
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for match, line in zip(row.matches, cells, strict=True):
            columns = [cell.rjust(width) for cell, width in zip(line, widths, strict=True) if width]
            lines.append("  ".join(["", *columns, shown(match.name)]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_dict(searcher: Searcher, rows: Sequence[Ranked], rerank: bool) -> dict[str, Any]:
    """The same as plain values; ``same_identity`` is null where a name carries no identity."""
    recall = searcher.gallery.recall
    return {
        "checkpoint": os.path.abspath(searcher.model.path),
        "model_fingerprint": searcher.model.fingerprint,
        "metric": searcher.model.metric,
        "reranked": rerank,
        "gallery": len(searcher),
        "recall": None if recall is None or rerank else recall.recall,
        "queries": [
            {
                "path": row.query.path,
                "identity": row.query.identity,
                "camera": row.query.camera,
                "crop": row.crop,
                "matches": [
                    {
                        "rank": match.rank,
                        "path": match.name,
                        "distance": match.distance,
                        "identity": match.identity,
                        "camera": match.camera,
                        "same_identity": row.same(match),
                    }
                    for match in row.matches
                ],
            }
            for row in rows
        ],
    }


def shown(path: str) -> str:
    """A path as a user would type it: relative to the current folder where it is below it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _about(identity: str, camera: str) -> list[str]:
    return [f"{name} {value}" if value else "" for name, value in (("identity", identity), ("camera", camera))]
