"""Retrieval scores of a test, of all queries and of each identity."""

from __future__ import annotations

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor
from torch.nn import functional as F

from pml_drsl.benchmark.training.images import Images
from pml_drsl.evaluation.distances import FeatureDistances
from pml_drsl.evaluation.ranking import RankedQueries, rank_queries
from pml_drsl.evaluation.scores import summarize

CMC_RANKS = (1, 5, 10)
_P_AT_1, _MAP_AT_R = "precision_at_1", "mean_average_precision_at_r"


def score(embeddings: Tensor, images: Images) -> tuple[dict[str, float], list[int | None]]:
    """Scores of all queries, in [0, 1], and of each identity. Cosine similarity ranks.

    Without cameras, every image is searched for in all others: ``MAP@R`` and ``P@1`` as pytorch-metric-learning has
    them. With cameras, ``mAP`` and ``rank-1``, ``rank-5``, ``rank-10``, by the protocol of Market-1501: images of the
    query's identity by the query's camera do not count.

    The score of an identity is the mean MAP@R or AP of its queries, in units of 0.0001. Identity ``i`` of the whole
    data set has place ``i``; None stands for an identity that was not tested, or has no query.
    """
    if images.cameras is None:
        found, of_identity = _pml(embeddings, images.labels)
    else:
        found, of_identity = _reid(embeddings, images)
    numbers = torch.arange(images.identities) if images.numbers is None else images.numbers
    placed: list[int | None] = [None] * (int(numbers.max()) + 1)
    for label, value in of_identity.items():
        placed[int(numbers[label])] = round(1e4 * value)
    return found, placed


def _pml(embeddings: Tensor, labels: Tensor) -> tuple[dict[str, float], dict[int, float]]:
    calculator = AccuracyCalculator(
        include=(_P_AT_1, _MAP_AT_R),
        k="max_bin_count",
        return_per_class=True,
        device=torch.device("cpu"),
        knn_func=CustomKNN(LpDistance(normalize_embeddings=False), batch_size=1024),
    )
    found = calculator.get_accuracy(F.normalize(embeddings), labels)
    # PML leaves out the identities with one image, which have nothing to find.
    identities, counts = labels.unique(return_counts=True)
    identities, counts = identities[counts > 1], counts[counts > 1].double()
    at_r, at_1 = (torch.tensor(found[name], dtype=torch.double) for name in (_MAP_AT_R, _P_AT_1))
    means = {name: float(counts @ values / counts.sum()) for name, values in (("MAP@R", at_r), ("P@1", at_1))}
    return means, dict(zip(identities.tolist(), at_r.tolist(), strict=True))


def _reid(embeddings: Tensor, images: Images) -> tuple[dict[str, float], dict[int, float]]:
    ranked = _ranked(embeddings, images)
    every = summarize(ranked)
    means = {"mAP": every.mAP, **{f"rank-{k}": every.rank(min(k, every.num_gallery)) for k in CMC_RANKS}}
    labels = images.labels if images.queries is None else images.labels[images.queries]
    labels, precision = labels[ranked.matched], ranked.average_precision[ranked.matched]
    return means, {int(label): float(precision[labels == label].mean()) for label in labels.unique()}


def _ranked(embeddings: Tensor, images: Images) -> RankedQueries:
    every = torch.ones_like(images.labels, dtype=torch.bool)
    query, gallery = (every, every) if images.queries is None else (images.queries, ~images.queries)
    assert images.cameras is not None
    distances = FeatureDistances(embeddings[query], embeddings[gallery], "cosine")
    labels, cameras = images.labels, images.cameras
    return rank_queries(distances, labels[query], labels[gallery], cameras[query], cameras[gallery])
