"""Searches the gallery for every query: features, scores and pictures of the rankings."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from pml_drsl.evaluation import reranking
from pml_drsl.evaluation.scores import FeatureDistances, RankedQueries, RetrievalResult, rank_queries, summarize
from torchreid_ext.evaluation.extraction import Samples, first_process_model, gather_samples, shard_of_loader
from torchreid_ext.evaluation.pictures import RankedQuery, save_ranking_picture
from torchreid_ext.runtime.signals import Interrupted

Paths = tuple[Sequence[Any], Sequence[Any]]


def extract(engine: Any, loader: Any, group: dist.ProcessGroup | None = None) -> Samples:
    """Extracts the features of all images of a loader with the model of the engine. The features are on the CPU.

    With a ``group``, each process of the group extracts its share, and every process gets all features. They are equal,
    bit for bit, to the features that one process extracts with the same number of threads.

    Raises:
        Interrupted: if a signal asks the run to stop.
        InputError, RuntimeError: on every process of a group, if one of them fails.
    """
    if group is None:
        return _extract(engine, loader)
    shard = shard_of_loader(loader, group)
    device = next(engine.model.parameters()).device
    try:
        with first_process_model(engine, group):
            return gather_samples(lambda: _extract(engine, shard) if len(shard) else None, device, group)
    except Interrupted as stop:  # perhaps only another process received the signal
        engine.stop.signum = stop.signal
        raise


@torch.no_grad()
def _extract(engine: Any, loader: Any) -> Samples:
    device = next(engine.model.parameters()).device
    features, pids, camids = [], [], []
    # disable=None shows the bar only on a terminal.
    for data in tqdm(loader, desc="features", leave=False, disable=None):
        images, batch_pids, batch_camids = engine.parse_data_for_eval(data)
        features.append(engine.extract_features(images.to(device)).cpu())
        pids.append(np.asarray(batch_pids))
        camids.append(np.asarray(batch_camids))
        engine.stop.check()
    return Samples(torch.cat(features), np.concatenate(pids), np.concatenate(camids))


class Search:
    """The ranking of a gallery for every query.

    Args:
        query: the query samples.
        gallery: the gallery samples.
        metric: ``"euclidean"`` or ``"cosine"``.
        normalize: whether to scale every feature to unit norm first.
        rerank: whether to re-rank by k-reciprocal neighbours.

    Raises:
        InputError: if the metric is unknown, or features are not finite.
    """

    def __init__(
        self, query: Samples, gallery: Samples, metric: str = "euclidean", normalize: bool = False, rerank: bool = False
    ) -> None:
        self.query, self.gallery = query, gallery
        features = query.features, gallery.features
        if normalize:
            features = F.normalize(query.features), F.normalize(gallery.features)
        search = reranking.rerank if rerank else FeatureDistances
        self.distances = search(*features, metric=metric)  # type: ignore[arg-type]

    def evaluate(
        self, single_gallery_shot: bool = False, max_rank: int = 50, group: dist.ProcessGroup | None = None
    ) -> RetrievalResult:
        """Returns CMC up to ``max_rank``, mAP and mINP, by the protocol of Market-1501 or CUHK03 (single-gallery-shot).

        The processes of ``group`` share the queries. Every one of them must call this method.
        """
        return summarize(self.ranked(single_gallery_shot, group), max_rank)

    def ranked(self, single_gallery_shot: bool = False, group: dist.ProcessGroup | None = None) -> RankedQueries:
        """Returns the scores of each query. The arguments are those of ``evaluate``."""
        query, gallery = self.query, self.gallery
        return rank_queries(
            self.distances,
            query.pids,
            gallery.pids,
            query.camids,
            gallery.camids,
            protocol="single-gallery-shot" if single_gallery_shot else "standard",
            group=group,
        )

    def ranking(self, index: int, topk: int, query_paths: Sequence[Any], gallery_paths: Sequence[Any]) -> RankedQuery:
        """Returns the nearest gallery entries of one query: ``topk`` valid entries, and the junk between them."""
        pid, camid = self.query.pids[index], self.query.camids[index]
        junk = (self.gallery.pids == pid) & (self.gallery.camids == camid)
        distances = self.distances.distances(index, index + 1)[0].cpu().numpy()
        order = distances.argsort(kind="stable")
        # An entry is shown if fewer than topk valid entries precede it.
        shown = order[np.cumsum(~junk[order]) - ~junk[order] < topk]
        return RankedQuery(
            query_paths[index],
            [gallery_paths[entry] for entry in shown],
            (self.gallery.pids[shown] == pid).tolist(),
            distances[shown].tolist(),
            junk[shown].tolist(),
        )


def print_result(result: RetrievalResult, ranks: Iterable[int]) -> None:
    """Prints a result in the format of torchreid."""
    print("** Results **")
    print(
        f"{result.num_query} queries, {result.num_unmatched} of them left out because they have no match; "
        f"{result.num_gallery} gallery entries, {result.num_junk / result.num_query:.1f} junk entries per query"
    )
    print(f"mAP: {result.mAP:.1%}\nmINP: {result.mINP:.1%}\nCMC curve")
    for rank in ranks:
        print(f"Rank-{rank:<3}: {result.rank(rank):.1%}")


def print_side_by_side(columns: dict[str, dict[str, RetrievalResult]], ranks: Sequence[int]) -> None:
    """Prints a table for each target, with one column for each test."""
    for target in next(iter(columns.values())):
        results = {name: results[target] for name, results in columns.items()}
        print(f"\n{target:<12}" + "".join(f"{name:>12}" for name in results))
        rows = [("mAP", [r.mAP for r in results.values()]), ("mINP", [r.mINP for r in results.values()])]
        rows += [(f"Rank-{rank}", [r.rank(rank) for r in results.values()]) for rank in ranks]
        for name, values in rows:
            print(f"{name:<12}" + "".join(f"{value:>12.1%}" for value in values))


def draw_page(search: Search, paths: Paths, indices: Sequence[int], topk: int, path: Path, title: str) -> Path:
    """Draws the rankings of some queries on one page. ``paths`` holds the image paths of queries and of the gallery."""
    return save_ranking_picture(path, [search.ranking(index, topk, *paths) for index in indices], title)


def draw_all(search: Search, paths: Paths, topk: int, folder: Path, title: str) -> Path:
    """Draws a page for every query, and writes ``index.html``, which shows all pages. Returns the path of the index.

    The query with the lowest average precision comes first. Queries without a match come last.
    """
    precision = search.ranked().average_precision.nan_to_num(torch.inf).tolist()
    order = sorted(range(len(precision)), key=precision.__getitem__)
    figures = []
    for index in tqdm(order, desc="rankings", leave=False, disable=None):
        score = f"AP {precision[index]:.1%}" if precision[index] <= 1 else "no match in the gallery"
        heading = f"query {index}, identity {search.query.pids[index]}, camera {search.query.camids[index]}: {score}"
        page = draw_page(search, paths, [index], topk, folder / f"query_{index:05d}.png", heading)
        figures.append(f'<p>{html.escape(heading)}<br><img loading="lazy" src="{page.name}" alt=""></p>')
    index_page = folder / "index.html"
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
    style = "<style>body{font-family:sans-serif}img{max-width:100%}</style>"
    heading = f"<h1>{html.escape(title)}</h1><p>{len(order)} queries, hardest first.</p>"
    index_page.write_text("\n".join([head + style, heading, *figures]))
    return index_page
