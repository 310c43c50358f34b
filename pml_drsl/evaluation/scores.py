"""Scores of a gallery search by the re-ID protocol: mAP, mINP and CMC, from features or from ranked queries."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pml_drsl.checks import InputError
from pml_drsl.evaluation import JUNK, RANKS, Metric, SearchProtocol, Ties, reranking
from pml_drsl.evaluation.arrays import Array, Junk, Labels, number_cameras, number_identities
from pml_drsl.evaluation.distances import FeatureDistances, as_features
from pml_drsl.evaluation.ranking import RankedQueries, check_options, rank_queries

__all__ = ["FeatureDistances", "RankedQueries", "RetrievalResult", "evaluate", "rank_queries", "summarize"]


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """The scores of one evaluation. Each score is a mean over the queries that have a match.

    Attributes:
        means: the mean of each score in ``pml_drsl.evaluation.ranking.SCORES`` by its name, in (0, 1].
        cmc: float64 array of shape (R,), in [0, 1], not falling; ``cmc[k - 1]`` is rank-k.
        num_query, num_gallery: numbers of queries, with or without a match, and of gallery entries. Images with a junk
            identity count nowhere.
        num_junk: number of (query, gallery entry) pairs that the protocol removed.
        num_unmatched: number of queries without a match in their gallery. They are not in the means.
        ranked: the scores and the identity of each query.
    """

    means: dict[str, float]
    cmc: np.ndarray[Any, np.dtype[np.float64]]
    num_query: int
    num_gallery: int
    num_junk: int
    num_unmatched: int
    ranked: RankedQueries = field(repr=False)

    @property
    def mAP(self) -> float:
        """Mean average precision, in (0, 1]."""
        return self.means["mAP"]

    @property
    def mINP(self) -> float:
        """Mean inverse negative penalty, in (0, 1] (Ye et al., TPAMI 2022)."""
        return self.means["mINP"]

    def scores(self, ranks: Sequence[int] = RANKS) -> dict[str, float]:
        """All scores by name: the means, and "rank-k" for each of the ranks; see ``rank``."""
        return self.means | {f"rank-{k}": self.rank(k) for k in ranks}

    def rank(self, k: int) -> float:
        """Rank-k, in [0, 1]. An InputError for a k below 1, or larger than a CMC that ``max_rank`` shortened."""
        if k < 1 or (k > len(self.cmc) and len(self.cmc) < self.num_gallery):
            raise InputError(f"rank {k} is outside 1..{len(self.cmc)}: evaluate with a larger max_rank")
        return float(self.cmc[min(k, len(self.cmc)) - 1])  # beyond the whole gallery there is nothing more to find

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain numbers for JSON; ``cmc`` becomes a list."""
        counts = {name: value for name, value in vars(self).items() if name.startswith("num_")}
        return {**self.means, "cmc": [float(value) for value in self.cmc], **counts}


def evaluate(
    query: Array,
    gallery: Array,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels | None = None,
    gallery_cams: Labels | None = None,
    *,
    metric: Metric = "euclidean",
    ties: Ties = "mean",
    protocol: SearchProtocol = "standard",
    max_rank: int = 50,
    rerank: bool = False,
    seed: int = 0,
    junk: Junk = JUNK,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> RetrievalResult:
    """Searches the gallery with every query, and scores the rankings by the protocol of Market-1501.

    The protocol is that of Zheng et al. (ICCV 2015), and torchreid follows it too. Gallery entries with the query's
    identity and camera are junk, and removed from the ranking. The others with the query's identity are matches
    (positives), and all remaining entries negatives, such as Market-1501's distractors with identity 0. A query without
    a match is counted in ``num_unmatched`` and is not scored. Images with a ``junk`` identity have no effect anywhere.

    ``ties`` says how to score a match and a negative at the same distance:
        ``"optimistic"``: the match comes first.
        ``"pessimistic"``: the negative comes first.
        ``"mean"``: each counts half before the other, as ``sigmoid(0) = 1/2`` in the loss. Then 1 - mAP is the limit
        of the loss's retrieval error at temperature 0. A match with ``e`` negatives and ``p`` matches before it, and
        ``t`` and ``s`` tied with it, has the precision ``r / (r + e + t / 2)``, where ``r = 1 + p + s / 2``. INP takes
        ``e + t / 2`` of the last match. CMC is the mean of the optimistic and the pessimistic curve.

    ``protocol`` says how CMC is measured:
        ``"standard"``: on the whole gallery.
        ``"single-gallery-shot"``: the first protocol of CUHK03. CMC is the average over 10 galleries for each query,
        with one entry of each identity, drawn at random. mAP and mINP use the whole gallery, as in torchreid.

    Args:
        query, gallery: features of shapes (Q, D) and (M, D), tensors or arrays of any floating-point type.
        query_ids, gallery_ids: identities, shapes (Q,) and (M,), integers or strings.
        query_cams, gallery_cams: cameras, shapes (Q,) and (M,). For retrieval without cameras, leave out both.
        metric: ``"euclidean"`` or ``"cosine"``.
        ties, protocol: see above.
        max_rank: length of the CMC, at least 1. A smaller gallery shortens the CMC.
        rerank: re-rank by k-reciprocal neighbours first; see ``pml_drsl.evaluation.reranking.rerank``.
        seed: seed of the draws of ``"single-gallery-shot"``. Global random generators are not used.
        junk: identities of images that have no effect, integers or strings. -1 stands for "-1" too.
        device: where to compute; None for the device of ``query``.
        progress: show a progress bar on stderr.

    An InputError refuses arguments out of range, NaN or infinity in features, text that stands for a missing identity
    or camera, and queries of which none has a match. A warning says if every query finds itself."""
    check_options(ties, protocol, max_rank, seed)
    if query_cams is None and gallery_cams is None and _same(query, gallery):
        cure = "to leave it out, give range(N) as query_cams and as gallery_cams"
        warnings.warn(f"query and gallery are the same, so that every query finds itself first; {cure}", stacklevel=2)
    distances: FeatureDistances | reranking.RerankedDistances
    if rerank:
        query, gallery = as_features(query, "query"), as_features(gallery, "gallery")
        numbers = number_identities(query_ids, gallery_ids, len(query), len(gallery), junk)
        number_cameras(query_cams, gallery_cams, len(query), len(gallery))  # before re-ranking, which takes minutes
        is_junk = numbers[0] < 0, numbers[1] < 0
        distances = reranking.rerank(query, gallery, metric=metric, is_junk=is_junk, device=device, progress=progress)
    else:
        distances = FeatureDistances(query, gallery, metric, device=device)
    labels = query_ids, gallery_ids, query_cams, gallery_cams
    ranked = rank_queries(distances, *labels, ties=ties, protocol=protocol, seed=seed, junk=junk, progress=progress)
    return summarize(ranked, max_rank)


def _same(query: Array, gallery: Array) -> bool:
    if query is gallery:
        return True
    if np.shape(query) != np.shape(gallery):
        return False
    features = as_features(query, "query").cpu(), as_features(gallery, "gallery").cpu()
    return features[0].dtype == features[1].dtype and torch.equal(*features)


def summarize(ranked: RankedQueries, max_rank: int = 50) -> RetrievalResult:
    """The mean scores of what ``rank_queries`` gave, over the queries with a match; ``max_rank`` as in ``evaluate``."""
    matched = ranked.matched
    return RetrievalResult(
        means={name: float(values[matched].mean()) for name, values in ranked.scores(()).items()},
        cmc=ranked.cmc(max_rank).numpy(),
        num_query=int((~ranked.is_junk).sum()),
        num_gallery=ranked.num_gallery,
        num_junk=int(ranked.num_junk.sum()),
        num_unmatched=int((~matched & ~ranked.is_junk).sum()),
        ranked=ranked,
    )
