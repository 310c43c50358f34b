"""Ranks the gallery for every query, prints the scores, and draws the rankings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch.nn import functional as F

from pml_drsl.evaluation import reranking
from pml_drsl.evaluation.scores import FeatureDistances, RetrievalResult, rank_queries, summarize
from torchreid_ext.evaluation import page
from torchreid_ext.evaluation.extraction import Samples
from torchreid_ext.evaluation.page import Found, Picture, Ranking
from torchreid_ext.evaluation.pictures import save_ranking_picture

Paths = tuple[Sequence[Any], Sequence[Any]]


class Search:
    """The ranking of a gallery for every query, by ``metric`` ``"euclidean"`` or ``"cosine"``.

    ``normalize`` scales every feature to unit norm first; ``rerank`` re-ranks by k-reciprocal neighbours, without the
    images of identity -1, which would be neighbours of others. ``kept`` are the numbers of the remaining queries and
    gallery entries. Raises InputError if the metric is unknown, or features are not finite.
    """

    def __init__(
        self, query: Samples, gallery: Samples, metric: str = "euclidean", normalize: bool = False, rerank: bool = False
    ) -> None:
        self.kept = tuple(np.flatnonzero((samples.pids != -1) | (not rerank)) for samples in (query, gallery))
        self.query, self.gallery = query.at(self.kept[0]), gallery.at(self.kept[1])
        features = self.query.features, self.gallery.features
        if normalize:
            features = F.normalize(features[0]), F.normalize(features[1])
        search = reranking.rerank if rerank else FeatureDistances
        self.distances = search(*features, metric=metric)  # type: ignore[arg-type]

    def evaluate(
        self, single_gallery_shot: bool = False, max_rank: int = 50, group: dist.ProcessGroup | None = None
    ) -> RetrievalResult:
        """Returns CMC up to ``max_rank``, mAP and mINP, by the protocol of Market-1501 or CUHK03 (single-gallery-shot).

        The processes of ``group`` share the queries. Every one of them must call this method.
        """
        query, gallery = self.query, self.gallery
        protocol: Any = "single-gallery-shot" if single_gallery_shot else "standard"
        labels = query.pids, gallery.pids, query.camids, gallery.camids
        return summarize(rank_queries(self.distances, *labels, protocol=protocol, group=group), max_rank)

    def ranking(self, index: int, topk: int, paths: Paths) -> Ranking:
        """Returns the nearest gallery entries of one kept query: ``topk`` valid entries, and the junk between them.

        ``paths`` are the images of all queries and of the gallery, each a path or the paths of a tracklet.
        """
        pid, camid = self.query.pids[index], self.query.camids[index]
        # Identity -1 is a badly drawn box, which has no effect either.
        junk = (self.gallery.pids == -1) | ((self.gallery.pids == pid) & (self.gallery.camids == camid))
        marks = np.select([junk, self.gallery.pids == pid], ["junk", "right"], "wrong")
        distances = self.distances.distances(index, index + 1)[0].cpu().numpy()
        order = distances.argsort(kind="stable")
        # An entry is shown if fewer than topk valid entries precede it.
        shown = order[np.cumsum(~junk[order]) - ~junk[order] < topk]
        images = [paths[1][number] for number in self.kept[1][shown]]
        nearest = zip(images, distances[shown].tolist(), marks[shown].tolist(), strict=True)
        matches = [Found(Picture(path), distance, mark) for path, distance, mark in nearest]
        return Ranking(Picture(paths[0][self.kept[0][index]]), matches)


def print_result(result: RetrievalResult, ranks: Sequence[int]) -> None:
    """Prints a result in the format of torchreid."""
    print("** Results **")
    print(
        f"{result.num_query} queries, {result.num_unmatched} of them left out because they have no match; "
        f"{result.num_gallery} gallery entries, {result.num_junk / result.num_query:.1f} junk entries per query"
    )
    curve = False
    for name, value in result.scores(ranks).items():
        if name.startswith("rank-") and not curve:
            print("CMC curve")
            curve = True
        print(f"{name.replace('rank-', 'Rank-'):<8}: {value:.1%}" if curve else f"{name}: {value:.1%}")


def print_side_by_side(columns: dict[str, dict[str, RetrievalResult]], ranks: Sequence[int]) -> None:
    """Prints a table for each target, with one column for each test."""
    for target in next(iter(columns.values())):
        results = {name: results[target].scores(ranks) for name, results in columns.items()}
        print(f"\n{target:<12}" + "".join(f"{name:>12}" for name in results))
        for name in next(iter(results.values())):
            print(
                f"{name.replace('rank-', 'Rank-'):<12}"
                + "".join(f"{values[name]:>12.1%}" for values in results.values())
            )


def draw_some(search: Search, paths: Paths, count: int, topk: int, path: Path, title: str) -> None:
    """Draws the rankings of ``count`` queries in one picture, with ``paths`` of queries and gallery."""
    # The queries are spread evenly over the query set, so that the picture shows many identities.
    indices = np.linspace(0, len(search.query.pids) - 1, min(count, len(search.query.pids))).astype(int).tolist()
    save_ranking_picture(path, [search.ranking(index, topk, paths) for index in indices], title)


def write_pages(search: Search, paths: Paths, topk: int, path: Path, title: str) -> None:
    """Writes the ranking of every query on web pages, by rising average precision; those without a match come last."""
    precision = search.evaluate().ranked.average_precision.nan_to_num(torch.inf).tolist()
    rankings = []
    for index in sorted(range(len(precision)), key=precision.__getitem__):
        note = f"AP {precision[index]:.1%}" if precision[index] <= 1 else "no match in the gallery"
        rankings.append(replace(search.ranking(index, topk, paths), note=note))
    page.write_pages(path, rankings, f"{len(rankings)} queries, hardest first.", title)
