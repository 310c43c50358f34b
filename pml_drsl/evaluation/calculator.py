"""``ReIDAccuracyCalculator``: the re-ID scores inside the testers of pytorch-metric-learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, FaissKNN
from torch import Tensor

from pml_drsl.checks import InputError
from pml_drsl.evaluation import JUNK, METRICS, RANKS, Metric, SearchProtocol, Ties
from pml_drsl.evaluation.arrays import Array, Junk, Labels, number_cameras, number_identities
from pml_drsl.evaluation.distances import FeatureDistances, as_features, check_option, squared_norms
from pml_drsl.evaluation.ranking import SCORES, RankedQueries, check_options, rank_queries

REID_METRICS = (*SCORES, "cmc", *(f"rank_{k}" for k in RANKS))


class ReIDAccuracyCalculator(AccuracyCalculator):
    """An ``AccuracyCalculator`` of pytorch-metric-learning that gives mAP, mINP and CMC by the re-ID protocol.

    Metrics: ``mAP``, ``mINP``, ``rank_1``, ``rank_5``, ``rank_10`` and ``rank_20``. Only if ``include`` names them:
    ``cmc`` (an array; ``cmc[k - 1]`` is rank-k), which not every tester can average, and the inherited metrics, which
    ignore cameras (NMI and AMI need faiss). Where no query has a match all metrics are NaN, with a warning, as in PML.
    An InputError refuses queries or a reference set of junk alone.

    A tester passes embeddings and labels, but no cameras. Give the cameras to the constructor, or to ``set_cameras``
    before other data is tested. The reference set of a tester is its reference splits in the order given, but the query
    split comes first if it is one of them::

        calculator = ReIDAccuracyCalculator(query_cams=query_cams, reference_cams=gallery_cams)
        tester = testers.GlobalEmbeddingSpaceTester(accuracy_calculator=calculator)
        tester.test({"query": query_set, "gallery": gallery_set}, epoch, model,
                    splits_to_eval=[("query", ["gallery"])])

    If the reference set includes the queries (``ref_includes_query``), each query is removed from its own gallery.
    Images with a ``junk`` identity are left out of all metrics, the inherited ones too.

    Args:
        include: metrics to compute; empty for all re-ID metrics but ``cmc``.
        exclude: metrics to leave out.
        query_cams, reference_cams: cameras of the queries, shape (Q,), and of the reference set (the gallery), shape
            (M,), or None for retrieval without cameras.
        metric, ties, protocol, max_rank, seed, junk: see ``pml_drsl.evaluation.scores.evaluate``.
        **kwargs: arguments of ``AccuracyCalculator``: ``avg_of_avgs``, ``return_per_class``, ``device`` and others, but
            no ``label_comparison_fn``. PML raises a ValueError for an unknown metric.

    An InputError refuses options out of range, and cameras of queries or reference set alone.
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
        junk: Junk = JUNK,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("label_comparison_fn") is not None:
            raise InputError("label_comparison_fn is not supported: identities are compared for equality")
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = torch.device(kwargs["device"])
        check_option("metric", metric, METRICS)
        check_options(ties, protocol, max_rank, seed)
        self.metric, self.ties, self.protocol = metric, ties, protocol
        self.max_rank, self.seed, self.junk = max_rank, seed, junk
        for name in REID_METRICS:  # PML finds its metrics by the names of these attributes.
            setattr(self, f"calculate_{name}", partial(self._calculate, name))
        self.set_cameras(query_cams, reference_cams)
        if metric == "cosine":  # The inherited metrics search by PML's function, which is Euclidean by default.
            kwargs.setdefault("knn_func", CustomKNN(CosineSimilarity()))
        try:
            FaissKNN()
        except NameError:  # PML raises this if faiss is not installed, even if no metric needs faiss.
            kwargs.setdefault("knn_func", CustomKNN(LpDistance(normalize_embeddings=False)))
        default = tuple(name for name in REID_METRICS if name != "cmc")
        super().__init__(include=tuple(include) or default, exclude=tuple(exclude), **kwargs)

    def set_cameras(self, query_cams: Labels | None, reference_cams: Labels | None) -> None:
        """Sets the cameras of the data that is tested next, in the order of the embeddings, or None for no cameras."""
        if (query_cams is None) != (reference_cams is None):
            raise InputError("query_cams and reference_cams belong together: give both, or neither to ignore cameras")
        self.query_cams, self.reference_cams = query_cams, reference_cams

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
        """The metrics by name; the arguments are those of PML. Features are compared in float32. Large identity numbers
        stay distinct. An InputError if labels are not integers (as PML's floats are), or there is not one label and one
        camera for each embedding, or ``include`` names a metric that the constructor did not. Cameras may be text."""
        if unknown := {*include} - {*self.original_function_dict}:
            there = ", ".join(self.original_function_dict)
            cure = "name it in the constructor's include"
            raise InputError(f"include names {min(unknown)!r}, and this calculator has {there}: {cure}")
        if reference is None:
            reference, reference_labels, ref_includes_query = query, query_labels, True
        if reference_labels is None:
            raise InputError("reference without reference_labels: give the identities of the reference set")
        both = as_features(query, "query"), as_features(reference, "reference")
        for side, features in zip(("query", "reference"), both, strict=True):  # PML itself does not notice NaN.
            squared_norms(features.float(), side)
        # PML converts labels to float32, which cannot tell identities above 2^24 apart. Numbers from 0 avoid this.
        given = _as_integers(query_labels, "query"), _as_integers(reference_labels, "reference")
        numbers = number_identities(*given, len(query), len(reference), self.junk, "labels")
        # PML's metrics would take all junk for images of one identity.
        kept = [of_side >= 0 for of_side in numbers]
        cams = number_cameras(self.query_cams, self.reference_cams, len(query), len(reference))
        self._cams: Any = cams and [of_side[mask] for of_side, mask in zip(cams, kept, strict=True)]
        data = list[Tensor]()
        for features, ids, mask in zip(both, numbers, kept, strict=True):
            data += [features[mask.to(features.device)], ids[mask]]
        options = ref_includes_query, tuple(include), tuple(exclude)
        return super().get_accuracy(*data, *options)  # type: ignore[no-any-return]

    def _get_accuracy(self, function_dict: dict[str, Callable[..., Any]], **kwargs: Any) -> dict[str, Any]:
        """Ranks once for all metrics; PML calls this after preparing inputs and before the ``calculate_`` methods."""
        if any(name in REID_METRICS for name in function_dict):
            distances = FeatureDistances(kwargs["query"], kwargs["reference"], self.metric)
            ids = kwargs["query_labels"].long(), kwargs["reference_labels"].long()
            options: dict[str, Any] = {"ties": self.ties, "protocol": self.protocol, "seed": self.seed}
            options["require_match"] = False  # A split without a match must not end the test of the others.
            options["gallery_starts_with_query"] = kwargs["ref_includes_query"]
            kwargs["ranked"] = rank_queries(distances, *ids, *(self._cams or ()), **options)
        return super()._get_accuracy(function_dict, **kwargs)  # type: ignore[no-any-return]

    def _calculate(self, name: str, ranked: RankedQueries, query_labels: Tensor, **kwargs: Any) -> Any:
        """One of ``REID_METRICS``, from the arguments that PML gives to every metric."""
        of_queries = ranked.hits(self.max_rank) if name == "cmc" else ranked.scores()[name.replace("_", "-")]
        scored = ranked.matched
        if not bool(scored.any()):
            scored, of_queries = ~scored, torch.full_like(of_queries, torch.nan)
        values = of_queries[scored]
        if self.avg_of_avgs or self.return_per_class:
            identity = query_labels.long().cpu()[scored]
            values = torch.stack([values[identity == each].mean(dim=0) for each in identity.unique()])
        if self.return_per_class:
            return values.tolist()
        mean = values.mean(dim=0)
        return mean.item() if mean.dim() == 0 else mean.numpy()


def _as_integers(labels: Array, side: str) -> Tensor:
    """Labels of shape (N,) or (N, 1), which PML may hold as floats, as integers of shape (N,)."""
    if isinstance(labels, np.ndarray) and min(labels.strides, default=0) < 0:
        labels = labels.copy()  # torch takes no reversed array
    try:
        tensor = labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError) as error:
        cure = "number the identities, or call pml_drsl.evaluation.scores.evaluate, which takes text"
        raise InputError(f"{side} labels are no integers ({error}): {cure}") from error
    tensor = tensor.squeeze(1) if tensor.dim() == 2 else tensor
    if tensor.dim() != 1:
        cure = "give one identity per embedding, and cameras through set_cameras"
        raise InputError(f"{side} labels have shape {list(tensor.shape)}: {cure}")
    integers = tensor.long()
    if len(others := tensor[integers.to(tensor.dtype) != tensor]):
        raise InputError(f"{side} labels are not integers: {others[0]}")
    return integers
