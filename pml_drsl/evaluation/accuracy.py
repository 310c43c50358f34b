"""Re-ID evaluation: mAP, mINP and CMC, aware of cameras, exact and in little memory.

Three ways in: ``evaluate`` for features, ``rank_queries`` for numbers per query or re-ranked distances, and
``ReIDAccuracyCalculator`` for pytorch-metric-learning's testers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, FaissKNN
from torch import Tensor

from pml_drsl.checks import InputError
from pml_drsl.evaluation import reranking
from pml_drsl.evaluation.distances import (
    METRICS,
    Array,
    DistanceRows,
    FeatureDistances,
    Metric,
    as_features,
    squared_norms,
)
from pml_drsl.evaluation.ranking import (
    PROTOCOLS,
    TIES,
    Labels,
    RankedQueries,
    SearchProtocol,
    Ties,
    rank_queries,
    shared_labels,
)

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "TIES",
    "DistanceRows",
    "FeatureDistances",
    "RankedQueries",
    "ReIDAccuracyCalculator",
    "RetrievalResult",
    "evaluate",
    "rank_queries",
    "summarize",
]

REID_METRICS = ("mAP", "mINP", "cmc", "rank_1", "rank_5", "rank_10", "rank_20")


@dataclass(frozen=True)
class RetrievalResult:
    """The scores of one evaluation, means over the queries that have a match.

    Attributes:
        mAP: mean average precision, in (0, 1].
        mINP: mean inverse negative penalty, in (0, 1] (Ye et al., TPAMI 2022).
        cmc: [R] float64 array in [0, 1], not falling; ``cmc[k - 1]`` is rank-k.
        num_query: queries, matched or not.
        num_gallery: gallery entries.
        num_junk: pairs of a query and a gallery entry that the protocol left out.
        num_unmatched: queries left out of the means because their gallery held no match.
    """

    mAP: float
    mINP: float
    cmc: np.ndarray[Any, np.dtype[np.float64]]
    num_query: int
    num_gallery: int
    num_junk: int
    num_unmatched: int

    def rank(self, k: int) -> float:
        """Rank-k: the share of queries with a match among their first k entries.

        Raises:
            InputError: for k below 1, or beyond a CMC that was cut by ``max_rank``.
        """
        if k < 1 or (k > len(self.cmc) and len(self.cmc) < self.num_gallery):
            raise InputError(f"rank {k} is outside 1..{len(self.cmc)}: evaluate with a larger max_rank")
        return float(self.cmc[min(k, len(self.cmc)) - 1])  # a whole small gallery holds no further entries

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; ``cmc`` becomes a list."""
        return {**vars(self), "cmc": [float(value) for value in self.cmc]}


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
    device: torch.device | str | None = None,
    chunk_size: int | None = None,
    progress: bool = False,
) -> RetrievalResult:
    """Scores a gallery search by Market-1501's protocol (Zheng et al., ICCV 2015), which is also torchreid's.

    Gallery entries of the query's own identity and camera are junk and removed. Every other entry of its
    identity is a match (positive), the rest are negatives. Queries without a match are counted, not scored.

    Ties, that is a match and a negative at the same distance:
        ``"optimistic"``: the match comes first. ``"pessimistic"``: the negative comes first. Both are what
        some order of the tied entries gives.
        ``"mean"``: each counts half before the other, as ``sigmoid(0) = 1/2`` in the loss, so that 1 - mAP is
        the limit of the loss's retrieval term at temperature 0: with ``e`` negatives before a match and ``t``
        tied, and ``p`` matches before it and ``s`` others tied, its precision is ``r / (r + e + t / 2)``,
        ``r = 1 + p + s / 2``. INP takes the place of the last match as (number of matches) + ``e + t / 2``.
        CMC is the mean of the optimistic and the pessimistic curve.

    SearchProtocol ``"single-gallery-shot"`` (CUHK03's first): CMC is averaged over 10 galleries per query, each with
    one entry per identity drawn at random; mAP and mINP are over the whole gallery, as torchreid has it.

    Args:
        query: [Q, D] features, a tensor or an array of any floating type.
        gallery: [M, D] features.
        query_ids: [Q] identities, integers or strings; [M] for ``gallery_ids``.
        gallery_ids: see ``query_ids``.
        query_cams: [Q] cameras; None, with ``gallery_cams``, for retrieval without cameras.
        gallery_cams: [M] cameras.
        metric: ``"euclidean"`` or ``"cosine"``.
        ties: see above.
        protocol: see above.
        max_rank: length of the CMC curve; a smaller gallery shortens it.
        rerank: re-rank by k-reciprocal neighbours first, with ``pml_drsl.evaluation.reranking.rerank``'s defaults.
        seed: of the single-gallery-shot draws, which touch no global generator.
        device: where to compute; None for where ``query`` is.
        chunk_size: queries at a time; None for about 64 MiB of distances.
        progress: show a progress bar on stderr.

    Raises:
        InputError: for anything above out of its range, NaN or infinite features, or if no query has a match.
    """
    distances: DistanceRows
    if rerank:
        distances = reranking.rerank(query, gallery, metric=metric, device=device, progress=progress)
    else:
        distances = FeatureDistances(query, gallery, metric, device=device)
    ranked = rank_queries(
        distances,
        query_ids,
        gallery_ids,
        query_cams,
        gallery_cams,
        ties=ties,
        protocol=protocol,
        seed=seed,
        chunk_size=chunk_size,
        progress=progress,
    )
    return summarize(ranked, max_rank)


def summarize(ranked: RankedQueries, max_rank: int = 50) -> RetrievalResult:
    """Means of ``ranked`` over the queries that have a match. Raises InputError for a ``max_rank`` below 1."""
    matched = ranked.matched
    return RetrievalResult(
        mAP=float(ranked.average_precision[matched].mean()),
        mINP=float(ranked.inverse_negative_penalty[matched].mean()),
        cmc=ranked.hits(max_rank)[matched].mean(dim=0).numpy(),
        num_query=len(matched),
        num_gallery=ranked.num_gallery,
        num_junk=int(ranked.num_junk.sum()),
        num_unmatched=int((~matched).sum()),
    )


class ReIDAccuracyCalculator(AccuracyCalculator):
    """mAP, mINP and CMC by the re-ID protocol, as a pytorch-metric-learning ``AccuracyCalculator``.

    Metrics: ``mAP``, ``mINP``, ``cmc`` (an array; ``cmc[k - 1]`` is rank-k), ``rank_1``, ``rank_5``, ``rank_10``
    and ``rank_20``. These are the ones computed when ``include`` is empty; the inherited metrics, which know no
    cameras, are computed when the constructor's ``include`` names them (NMI and AMI need faiss).

    Cameras: a PML tester hands over embeddings and labels alone, in the order of the data sets. So give the
    cameras in that order, to the constructor or, before testing other data, to ``set_cameras``. They are
    used when the numbers of queries and references agree, and an error says so when they do not::

        calculator = ReIDAccuracyCalculator(query_cams=query_cams, reference_cams=gallery_cams)
        tester = testers.GlobalEmbeddingSpaceTester(accuracy_calculator=calculator)
        tester.test({"query": query_set, "gallery": gallery_set}, epoch, model,
                    splits_to_eval=[("query", ["gallery"])])

    When the reference includes the queries (``ref_includes_query``), each query is left out of its own gallery.

    Args:
        include: metrics to compute; empty for all re-ID metrics.
        exclude: metrics to leave out.
        query_cams: [Q] cameras, or None for retrieval without cameras.
        reference_cams: [M] cameras of the reference (gallery).
        metric: ``"euclidean"`` or ``"cosine"``.
        ties: see ``evaluate``.
        protocol: see ``evaluate``.
        max_rank: length of ``cmc``.
        seed: see ``evaluate``.
        **kwargs: passed to ``AccuracyCalculator``: ``avg_of_avgs``, ``return_per_class``, ``device``, ...

    Raises:
        InputError: for unknown metrics, or a ``label_comparison_fn`` (identities are compared for equality).
    """

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        *,
        query_cams: Labels | None = None,
        reference_cams: Labels | None = None,
        metric: Metric = "euclidean",
        ties: Ties = "mean",
        protocol: SearchProtocol = "standard",
        max_rank: int = 50,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("label_comparison_fn") is not None:
            raise InputError("label_comparison_fn is not supported: identities are compared for equality")
        self.metric = metric
        self.ties = ties
        self.protocol = protocol
        self.max_rank = max_rank
        self.seed = seed
        self.set_cameras(query_cams, reference_cams)
        try:
            FaissKNN()
        except NameError:  # PML's way to say that faiss is not installed, even where nothing would use it
            kwargs.setdefault("knn_func", CustomKNN(LpDistance(normalize_embeddings=False)))
        super().__init__(include=tuple(include) or REID_METRICS, exclude=tuple(exclude), **kwargs)

    def set_cameras(self, query_cams: Labels | None, reference_cams: Labels | None) -> None:
        """Sets the cameras of the next data: [Q] and [M], in the order of the data sets; None for no cameras."""
        self.query_cams = query_cams
        self.reference_cams = reference_cams

    def get_accuracy(
        self,
        query: Array,
        query_labels: Array,
        reference: Array | None = None,
        reference_labels: Array | None = None,
        ref_includes_query: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The metrics by name; arguments as in PML's ``AccuracyCalculator.get_accuracy``.

        Features are compared in float32. Identities of any integer size are told apart.

        Raises:
            InputError: for labels that are not one integer per embedding, for cameras that do not match the
                embeddings in number, NaN or infinite embeddings, or if no query has a match.
        """
        if reference is None or reference_labels is None:
            reference, reference_labels, ref_includes_query = query, query_labels, True
        # Before PML compares query with reference, to which NaN is merely a difference.
        for side, features in (("query", query), ("reference", reference)):
            squared_norms(as_features(features, side).float(), side)
        # PML casts labels to float32, which merges identities above 2^24: number them from 0 first.
        labels = shared_labels(
            _as_integers(query_labels, "query"),
            _as_integers(reference_labels, "reference"),
            len(query),
            len(reference),
            "labels",
        )
        metrics: dict[str, Any] = super().get_accuracy(
            query, labels[0], reference, labels[1], ref_includes_query, tuple(include), tuple(exclude)
        )
        return metrics

    def _get_accuracy(self, function_dict: dict[str, Callable[..., Any]], **kwargs: Any) -> dict[str, Any]:
        """PML's hook between preparing the inputs and calling each ``calculate_`` method: ranks once for all."""
        if any(name in REID_METRICS for name in function_dict):
            kwargs["ranked"] = rank_queries(
                FeatureDistances(kwargs["query"], kwargs["reference"], self.metric),
                kwargs["query_labels"].long(),
                kwargs["reference_labels"].long(),
                self.query_cams,
                self.reference_cams,
                ties=self.ties,
                protocol=self.protocol,
                seed=self.seed,
                gallery_starts_with_query=kwargs["ref_includes_query"],
            )
        metrics: dict[str, Any] = super()._get_accuracy(function_dict, **kwargs)
        return metrics

    def calculate_mAP(self, ranked: RankedQueries, query_labels: Tensor, **kwargs: Any) -> Any:
        return self._average(ranked.average_precision, ranked, query_labels)

    def calculate_mINP(self, ranked: RankedQueries, query_labels: Tensor, **kwargs: Any) -> Any:
        return self._average(ranked.inverse_negative_penalty, ranked, query_labels)

    def calculate_cmc(self, ranked: RankedQueries, query_labels: Tensor, **kwargs: Any) -> Any:
        return self._average(ranked.hits(self.max_rank), ranked, query_labels)

    def calculate_rank_1(self, ranked: RankedQueries, query_labels: Tensor, **kwargs: Any) -> Any:
        return self._average(ranked.hits(1)[:, -1], ranked, query_labels)

    def calculate_rank_5(self, ranked: RankedQueries, query_labels: Tensor, **kwargs: Any) -> Any:
        return self._average(ranked.hits(5)[:, -1], ranked, query_labels)

    def calculate_rank_10(self, ranked: RankedQueries, query_labels: Tensor, **kwargs: Any) -> Any:
        return self._average(ranked.hits(10)[:, -1], ranked, query_labels)

    def calculate_rank_20(self, ranked: RankedQueries, query_labels: Tensor, **kwargs: Any) -> Any:
        return self._average(ranked.hits(20)[:, -1], ranked, query_labels)

    def _average(self, values: Tensor, ranked: RankedQueries, query_labels: Tensor) -> Any:
        """Mean over matched queries of [Q] or [Q, R] values, by identity where ``AccuracyCalculator`` was told so."""
        matched = ranked.matched
        values = values[matched]
        if self.avg_of_avgs or self.return_per_class:
            identity = query_labels.long().cpu()[matched]
            counts = torch.bincount(identity)
            sums = torch.zeros(len(counts), *values.shape[1:], dtype=values.dtype).index_add_(0, identity, values)
            present = counts > 0
            values = sums[present] / counts[present].view(-1, *[1] * (values.dim() - 1))
        if self.return_per_class:
            return values.tolist()
        mean = values.mean(dim=0)
        return mean.item() if mean.dim() == 0 else mean.numpy()


def _as_integers(labels: Array, side: str) -> Tensor:
    """[N] integers of [N] or [N, 1] labels that PML may hold as floats."""
    tensor = torch.as_tensor(labels)
    if tensor.dim() == 2 and tensor.shape[1] == 1:
        tensor = tensor.squeeze(1)
    if tensor.dim() != 1:
        raise InputError(
            f"{side} labels have shape {list(tensor.shape)}: give one identity per embedding, "
            "and cameras through set_cameras"
        )
    integers = tensor.long()
    if not torch.equal(integers.to(tensor.dtype), tensor):
        raise InputError(f"{side} labels are not integers: {tensor[integers.to(tensor.dtype) != tensor][0]}")
    return integers
