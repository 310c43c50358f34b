"""Testing a network on a target: features, scores and pictures of the rankings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pml_drsl.accuracy import FeatureDistances, RetrievalResult, rank_queries, summarize
from torchreid_ext.pictures import RankedQuery, save_ranking_picture


@dataclass(frozen=True)
class Samples:
    """Features, shape (N, D), identities and cameras, shape (N,), of a query set or a gallery."""

    features: Tensor
    pids: np.ndarray[Any, Any]
    camids: np.ndarray[Any, Any]


@torch.no_grad()
def extract(engine: Any, loader: Any) -> Samples:
    """The features that the engine's model gives to the images of a loader, on the CPU.

    Raises:
        Interrupted: if the run is asked to stop.
    """
    device = next(engine.model.parameters()).device
    features, pids, camids = [], [], []
    # tqdm's own check for a terminal: nothing is drawn into a file.
    for data in tqdm(loader, desc="features", leave=False, disable=None):
        images, batch_pids, batch_camids = engine.parse_data_for_eval(data)
        features.append(engine.extract_features(images.to(device)).cpu())
        pids.append(np.asarray(batch_pids))
        camids.append(np.asarray(batch_camids))
        engine.stop.check()
    return Samples(torch.cat(features), np.concatenate(pids), np.concatenate(camids))


class Search:
    """A gallery ranked for every query.

    Args:
        query: the query samples.
        gallery: the gallery samples.
        metric: ``"euclidean"`` or ``"cosine"``.
        normalize: give features unit norm first.
        rerank: re-rank by k-reciprocal neighbours.

    Raises:
        ValueError: for an unknown metric, or features that are not finite.
    """

    def __init__(
        self, query: Samples, gallery: Samples, metric: str = "euclidean", normalize: bool = False, rerank: bool = False
    ) -> None:
        self.query, self.gallery = query, gallery
        features = query.features, gallery.features
        if normalize:
            features = F.normalize(query.features), F.normalize(gallery.features)
        self.distances = FeatureDistances(*features, metric)  # type: ignore[arg-type]

    def evaluate(self, single_gallery_shot: bool = False) -> RetrievalResult:
        """CMC, mAP and mINP by Market-1501's protocol, or CUHK03's single-gallery-shot."""
        query, gallery = self.query, self.gallery
        ranked = rank_queries(
            self.distances,
            query.pids,
            gallery.pids,
            query.camids,
            gallery.camids,
            protocol="single-gallery-shot" if single_gallery_shot else "standard",
        )
        return summarize(ranked)

    def ranking(self, index: int, topk: int, query_paths: Sequence[Any], gallery_paths: Sequence[Any]) -> RankedQuery:
        """The ``topk`` nearest gallery entries of one query, without its junk; of a tracklet, its first image."""
        pid, camid = self.query.pids[index], self.query.camids[index]
        junk = (self.gallery.pids == pid) & (self.gallery.camids == camid)
        distances = self.distances.distances(index, index + 1)[0].masked_fill(torch.from_numpy(junk), torch.inf)
        nearest = distances.argsort(stable=True)[: min(topk, int((~junk).sum()))].tolist()
        return RankedQuery(
            _first_image(query_paths[index]),
            [_first_image(gallery_paths[entry]) for entry in nearest],
            [bool(self.gallery.pids[entry] == pid) for entry in nearest],
            distances[nearest].tolist(),
        )


def print_result(result: RetrievalResult, ranks: Iterable[int]) -> None:
    """Prints a result in torchreid's words."""
    print(f"** Results ** ({result.num_query} queries, {result.num_gallery} gallery entries)")
    if result.num_unmatched:
        print(f"left out: {result.num_unmatched} queries without a match from another camera")
    print(f"mAP: {result.mAP:.1%}\nmINP: {result.mINP:.1%}\nCMC curve")
    for rank in ranks:
        print(f"Rank-{rank:<3}: {result.rank(rank):.1%}")


def print_side_by_side(columns: dict[str, dict[str, RetrievalResult]], ranks: Sequence[int]) -> None:
    """Prints the results of several tests, one column each, target by target."""
    for target in next(iter(columns.values())):
        results = {name: results[target] for name, results in columns.items()}
        print(f"\n{target:<12}" + "".join(f"{name:>12}" for name in results))
        rows = [("mAP", [r.mAP for r in results.values()]), ("mINP", [r.mINP for r in results.values()])]
        rows += [(f"Rank-{rank}", [r.rank(rank) for r in results.values()]) for rank in ranks]
        for name, values in rows:
            print(f"{name:<12}" + "".join(f"{value:>12.1%}" for value in values))


def draw_rankings(
    search: Search,
    paths: tuple[Sequence[Any], Sequence[Any]],
    indices: Sequence[int],
    topk: int,
    path: Path,
    title: str,
) -> Path:
    """Draws the rankings of some queries on one page, right and wrong marked; ``paths`` of query and gallery."""
    return save_ranking_picture(path, [search.ranking(index, topk, *paths) for index in indices], title)


def _first_image(paths: Any) -> str:
    return paths if isinstance(paths, str) else paths[0]
