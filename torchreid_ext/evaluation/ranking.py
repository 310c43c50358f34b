"""Ranks the gallery for every query, prints the scores, and draws the rankings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import distributed as dist
from torch.nn import functional as F

from pml_drsl.evaluation import reranking
from pml_drsl.evaluation.scores import FeatureDistances, RankedQueries, RetrievalResult, rank_queries, summarize
from torchreid_ext.evaluation.extraction import Samples
from torchreid_ext.evaluation.page import Found, Picture, Ranking

Pictures = tuple[Sequence[Picture], Sequence[Picture]]  # all queries, and the whole gallery
Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


class Search:
    """The ranking of a gallery for every query, by ``metric`` ``"euclidean"`` or ``"cosine"``.

    ``normalize`` scales every feature to unit norm first; ``rerank`` re-ranks by k-reciprocal neighbours, in which
    images of identity -1 take no part. Raises InputError if the metric is unknown, or features are not finite."""

    def __init__(
        self, query: Samples, gallery: Samples, metric: str = "euclidean", normalize: bool = False, rerank: bool = False
    ) -> None:
        self.query, self.gallery, self.metric = query, gallery, metric
        wanted, searched = (F.normalize(part.features) if normalize else part.features for part in (query, gallery))
        is_junk = torch.from_numpy(query.pids == -1), torch.from_numpy(gallery.pids == -1)
        search = partial(reranking.rerank, is_junk=is_junk) if rerank else FeatureDistances
        self.distances = search(wanted, searched, metric=metric)  # type: ignore[arg-type]

    def evaluate(
        self, single_gallery_shot: bool = False, max_rank: int = 50, group: dist.ProcessGroup | None = None
    ) -> RetrievalResult:
        """Returns CMC up to ``max_rank``, mAP and mINP, by the protocol of Market-1501 or CUHK03 (single-gallery-shot).
        The processes of ``group`` share the queries. Every one of them must call this method."""
        protocol: Any = "single-gallery-shot" if single_gallery_shot else "standard"
        labels = self.query.pids, self.gallery.pids, self.query.camids, self.gallery.camids
        return summarize(rank_queries(self.distances, *labels, protocol=protocol, group=group), max_rank)

    def masks(self, start: int, stop: int) -> tuple[Mask, Mask]:
        """Which gallery entries are matches, and which are junk, of the queries from ``start`` to ``stop``: (q, M)."""
        same = self.query.pids[start:stop, None] == self.gallery.pids
        # Identity -1 is a badly drawn box, which has no effect either.
        junk = (self.gallery.pids == -1) | (same & (self.query.camids[start:stop, None] == self.gallery.camids))
        return same & ~junk, junk

    def ranking(self, index: int, topk: int, pictures: Pictures, first_match: bool = False) -> Ranking:
        """The nearest gallery entries of one query: ``topk`` valid entries, and the junk between them. With
        ``first_match`` the nearest match follows, where it is not among them."""
        right, junk = (mask[0] for mask in self.masks(index, index + 1))
        marks = np.select([junk, right], ["junk", "right"], "wrong")
        distances = self.distances.distances(index, index + 1)[0].cpu().numpy()
        order = distances.argsort(kind="stable")
        ranks = np.cumsum(~junk[order])
        # An entry is shown if fewer than topk valid entries precede it, and if it took part in re-ranking.
        shown = (ranks - ~junk[order] < topk) & np.isfinite(distances[order])
        if first_match and right.any():
            shown[right[order].argmax()] = True
        matches = [
            Found(pictures[1][entry], float(distances[entry]), str(marks[entry]), rank)
            for entry, rank in zip(order[shown].tolist(), ranks[shown].tolist(), strict=True)
        ]
        return Ranking(pictures[0][index], matches)


def print_result(result: RetrievalResult, ranks: Sequence[int], nobody: int = 0) -> None:
    """Prints a result in the format of torchreid; ``nobody`` is the number of images of identity -1 in the test."""
    queries = f"{result.num_query} queries, {result.num_unmatched} of them left out because they have no match"
    left_out = f"{result.num_junk / result.num_query:.1f} left out per query (itself, or the same person and camera)"
    print(f"** Results **\n{queries}; {result.num_gallery} gallery entries, {left_out}")
    if nobody:
        print(f"{nobody} images of identity -1 left out")
    for name, value in result.means.items():
        print(f"{name}: {value:.1%}")
    print("CMC curve")
    for k in ranks:
        print(f"{f'Rank-{k}':<8}: {result.rank(k):.1%}")


def print_side_by_side(columns: dict[str, dict[str, RetrievalResult]], ranks: Sequence[int]) -> None:
    """Prints a table for each target, with one column for each test."""
    for target in next(iter(columns.values())):
        results = {name: results[target].scores(ranks) for name, results in columns.items()}
        print(f"\n{target:<12}" + "".join(f"{name:>12}" for name in results))
        for name in next(iter(results.values())):
            cells = "".join(f"{values[name]:>12.1%}" for values in results.values())
            print(f"{name.replace('rank-', 'Rank-'):<12}{cells}")


def some(search: Search, pictures: Pictures, count: int, topk: int) -> list[Ranking]:
    """The rankings of ``count`` queries, the same ones in every test."""
    # The queries are spread evenly over the query set, so that a picture shows many identities.
    indices = np.linspace(0, len(search.query.pids) - 1, min(count, len(search.query.pids))).astype(int).tolist()
    return [search.ranking(index, topk, pictures) for index in indices]


def hardest(
    search: Search, ranked: RankedQueries, pictures: Pictures, topk: int, count: int | None = None
) -> list[Ranking]:
    """The rankings of ``count`` queries, or all, by rising average precision; those without a match come last."""
    precision = ranked.average_precision.nan_to_num(torch.inf).tolist()
    # The mean of equally likely places, where ties leave the place open.
    places = ranked.first_places.mean(dim=1).tolist()
    rankings = []
    for index in sorted(range(len(precision)), key=precision.__getitem__)[:count]:
        note = f"first match at rank {places[index]:g}, AP {precision[index]:.1%}"
        note = note if precision[index] <= 1 else "no match in the gallery"
        rankings.append(replace(search.ranking(index, topk, pictures, first_match=True), note=note))
    return rankings
