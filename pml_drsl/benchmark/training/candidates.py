"""The losses that the quality benchmark compares, and the hyper-parameters tried for each.

Every loss has six trials, on the validation identities alone. Where a loss has a default or a published setting, it is
among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from torch import Tensor, nn
from torch.nn import functional as F

from pml_drsl.losses import DRSLoss
from pml_drsl.miners import FourIndices, NegativeBudgetMiner
from pml_drsl.wrappers import CrossBatchMemory

if TYPE_CHECKING:
    from pml_drsl.benchmark.training.trial import Trial

TRIALS = 6
DRSL = "DRSL"
CROSS_ENTROPY = "cross-entropy"


@dataclass(frozen=True)
class Candidate:
    """A loss, and what to try.

    Attributes:
        make: the loss, from its parameters; those with weights take ``num_classes`` and ``embedding_size`` too.
        grid: the parameters of each trial.
        miner: what mines for it, from the parameter ``epsilon`` where it takes one.
        has_weights: whether it has weights of its own, per identity; their learning rate is the parameter ``lr``.
        in_memory: whether it can stand behind a cross-batch memory, at about the cost of a step without: the triplets
            of a memory are millions, and NTXent makes as many comparisons.
    """

    make: Callable[..., nn.Module]
    grid: tuple[dict[str, Any], ...]
    miner: Callable[..., nn.Module] | None = None
    has_weights: bool = False
    in_memory: bool = False


def _grid(**values: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


DISTANCES: dict[str, Callable[[], BaseDistance]] = {
    "euclidean": LpDistance,
    "squared euclidean": lambda: LpDistance(power=2),
    "cosine": CosineSimilarity,
    "raw euclidean": lambda: LpDistance(normalize_embeddings=False),
}


def _drsl(distance: str = "euclidean", **parameters: Any) -> nn.Module:
    return DRSLoss(distance=DISTANCES[distance](), **parameters)


def _smooth_ap(temperature: float) -> nn.Module:
    return _AmongItself(DRSLoss(temperature, sort_weight=0, distance=CosineSimilarity()))


TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
MARGINS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)

CANDIDATES: dict[str, Candidate] = {
    DRSL: Candidate(
        _drsl,
        (
            *_grid(distance=("cosine",), temperature=(0.05, 0.1), margin=(0.1,), sort_weight=(0.0,)),
            *_grid(distance=("cosine",), temperature=(0.02, 0.05), margin=(0.0,), sort_weight=(0.0,), bound=(True,)),
            {"distance": "cosine", "temperature": 0.02, "margin": 0.0, "sort_weight": 0.1, "bound": True},
            {"distance": "euclidean", "temperature": 0.01, "margin": 0.0, "sort_weight": 0.3},
        ),
        in_memory=True,
    ),
    "SmoothAP": Candidate(_smooth_ap, _grid(temperature=TEMPERATURES)),
    "SmoothAP (PML)": Candidate(losses.SmoothAPLoss, _grid(temperature=TEMPERATURES)),
    "FastAP": Candidate(losses.FastAPLoss, _grid(num_bins=(5, 10, 20, 30, 50, 100))),
    "RankedList": Candidate(losses.RankedListLoss, _grid(margin=(0.2, 0.4, 0.6), Tn=(0, 10))),
    "TripletMargin": Candidate(losses.TripletMarginLoss, _grid(margin=MARGINS)),
    "TripletMargin, batch-hard": Candidate(
        losses.TripletMarginLoss, _grid(margin=MARGINS), miners.BatchHardMiner, in_memory=True
    ),
    "TripletMargin, MS miner": Candidate(
        losses.TripletMarginLoss,
        _grid(margin=(0.1, 0.2, 0.4), epsilon=(0.1, 0.3)),
        miners.MultiSimilarityMiner,
    ),
    "MultiSimilarity": Candidate(
        losses.MultiSimilarityLoss, _grid(beta=(20, 50), base=(0.3, 0.5, 0.7)), in_memory=True
    ),
    "Circle": Candidate(losses.CircleLoss, _grid(m=(0.25, 0.4, 0.5), gamma=(40, 80)), in_memory=True),
    "Contrastive": Candidate(
        losses.ContrastiveLoss, _grid(pos_margin=(0.0, 0.3), neg_margin=(0.6, 0.8, 1.0)), in_memory=True
    ),
    "SupCon": Candidate(losses.SupConLoss, _grid(temperature=(0.03, 0.05, 0.1, 0.2, 0.3, 0.5)), in_memory=True),
    "NTXent": Candidate(losses.NTXentLoss, _grid(temperature=(0.03, 0.05, 0.07, 0.1, 0.2, 0.5))),
    "ProxyAnchor": Candidate(
        losses.ProxyAnchorLoss, _grid(margin=(0.1, 0.3), alpha=(16, 32, 64), lr=(1e-2,)), has_weights=True
    ),
    "ArcFace": Candidate(
        losses.ArcFaceLoss, _grid(margin=(11.5, 28.6), scale=(16, 32, 64), lr=(1e-2,)), has_weights=True
    ),
    "NormalizedSoftmax": Candidate(
        losses.NormalizedSoftmaxLoss, _grid(temperature=(0.05, 0.1, 0.2), lr=(1e-3, 1e-2)), has_weights=True
    ),
    CROSS_ENTROPY: Candidate(
        lambda **parameters: _Classifier(**parameters),
        _grid(label_smoothing=(0.0, 0.1), lr=(1e-3, 3e-3, 1e-2)),
        has_weights=True,
    ),
}
"""Every loss by the name the tables have. SmoothAP is as its authors define it: DRSL's own special case."""


class Criterion(nn.Module):
    """A candidate with what the trial puts around it.

    Attributes:
        lr: learning rate of its weights; None for that of the network.
    """

    def __init__(self, trial: Trial, identities: int, dim: int) -> None:
        super().__init__()
        candidate = CANDIDATES[trial.loss]
        parameters = dict(trial.parameters)
        self.lr = parameters.pop("lr", None)
        mining = {"epsilon": parameters.pop("epsilon")} if "epsilon" in parameters else {}
        if candidate.has_weights:
            parameters.update(num_classes=identities, embedding_size=dim)
        self.loss = candidate.make(**parameters)
        self.miner = None if candidate.miner is None else candidate.miner(**mining)
        if trial.negatives_per_positive:
            self.miner = _OnePositive(trial.negatives_per_positive, "random", seed=trial.seed)
        self.in_memory = trial.memory > 0
        if self.in_memory:
            self.loss = CrossBatchMemory(self.loss, dim, trial.memory, self.miner)
        self.weight = trial.cross_entropy
        self.cross_entropy = _Classifier(identities, dim) if self.weight else None

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self.in_memory or self.miner is None:
            loss: Tensor = self.loss(embeddings, labels)
        else:
            loss = self.loss(embeddings, labels, self.miner(embeddings, labels))
        if self.cross_entropy is not None:
            loss = loss + self.weight * self.cross_entropy(embeddings, labels)
        return loss


class _OnePositive(NegativeBudgetMiner):
    """``NegativeBudgetMiner`` of queries with one positive each, drawn at random: with more, and a memory that holds
    all identities alike, no ratio could exceed their number."""

    def select(self, embeddings: Tensor, ref_emb: Tensor, positives: Tensor, negatives: Tensor) -> FourIndices:
        cost = self._random(len(embeddings), len(ref_emb), embeddings.device).masked_fill(~positives, torch.inf)
        one = torch.zeros_like(positives).scatter_(1, cost.argmin(1, keepdim=True), True)
        return super().select(embeddings, ref_emb, positives & one, negatives)


class _AmongItself(nn.Module):
    """A loss whose queries are among their own candidates."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor, indices: Any = None) -> Tensor:
        return self.loss(x, labels, indices, x.clone(), labels.clone())  # type: ignore[no-any-return]


class _Classifier(nn.Module):
    """Cross-entropy of a linear layer on normalised features, which are not what is searched by (the neck of Luo et
    al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", CVPRW 2019)."""

    def __init__(self, num_classes: int, embedding_size: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(embedding_size), nn.Linear(embedding_size, num_classes, bias=False))
        nn.init.normal_(self.layers[1].get_parameter("weight"), std=0.001)
        self.label_smoothing = label_smoothing

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(x), labels, label_smoothing=self.label_smoothing)
