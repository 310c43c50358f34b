"""The losses that the benchmark compares, their defaults, and the hyper-parameters tried for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
from torch import Tensor, nn
from torch.nn import functional as F

from pml_drsl.losses import DRSLoss

SETTINGS = 6
DRSL = "DRSL"
SMALL_POWER = "DRSL (power 0.1)"
"""``DRSLoss(bound_power=0.1)``: not the default, but measured like one."""
CROSS_ENTROPY = "cross-entropy"
WEIGHTS_LR = 1e-2
"""Learning rate of a loss's own weights, in Adam: the one in pytorch-metric-learning's documentation."""


@dataclass(frozen=True)
class Candidate:
    """A loss, and what to try.

    Attributes:
        make: the loss, from its parameters; a loss with weights takes ``num_classes`` and ``embedding_size`` too.
        grid: the parameters of each setting, the default first; the others are spread around the default and around
            published settings.
        miner: makes the miner of the loss, from the parameter ``epsilon`` where it takes one.
        has_weights: whether the loss has weights of its own, per identity.
        lr: learning rate of these weights where the parameters have none; None for that of the network.
        in_memory: whether the loss can stand behind a cross-batch memory, at about the cost of a step without: the
            triplets of a memory are millions, and NTXent makes as many comparisons.
    """

    make: Callable[..., nn.Module]
    grid: tuple[dict[str, Any], ...]
    miner: Callable[..., nn.Module] | None = None
    has_weights: bool = False
    lr: float | None = None
    in_memory: bool = False


DISTANCES: dict[str, Callable[[], BaseDistance]] = {
    "euclidean": LpDistance,
    "squared euclidean": lambda: LpDistance(power=2),
    "cosine": CosineSimilarity,
    "raw euclidean": lambda: LpDistance(normalize_embeddings=False),
}


def _drsl(distance: str, **parameters: Any) -> nn.Module:
    return DRSLoss(distance=DISTANCES[distance](), **parameters)


def drsl_defaults() -> dict[str, Any]:
    """The parameters of ``DRSLoss()``, spelled out: results made before a default changes are not taken for its own."""
    loss = DRSLoss()
    names = [name for name in inspect.signature(DRSLoss.__init__).parameters if name not in _NOT_SETTINGS]
    return {"distance": _name_of(loss.distance), **{name: getattr(loss, name) for name in names}}


_NOT_SETTINGS = ("self", "query_chunk_size", "kwargs")


def _name_of(distance: BaseDistance) -> str:
    def traits(one: BaseDistance) -> tuple[Any, ...]:
        return one.is_inverted, one.p, one.power, one.normalize_embeddings

    return next(name for name, make in DISTANCES.items() if traits(make()) == traits(distance))


def _drsl_grid() -> tuple[dict[str, Any], ...]:
    changes: list[dict[str, Any]] = [
        {},
        {"bound_power": 0.1},
        {"bound_power": 0.1, "temperature": 0.05},
        {"bound_power": 0.1, "temperature": 0.2},
        {"bound_power": 0.1, "sort_weight": 0.5},
        {"temperature": 0.05},
    ]
    return tuple({**drsl_defaults(), **change} for change in changes)


def _small_power_grid() -> tuple[dict[str, Any], ...]:
    default = {**drsl_defaults(), "bound_power": 0.1}
    changes: list[dict[str, Any]] = [
        {},
        {"temperature": 0.05},
        {"temperature": 0.07},
        {"temperature": 0.2},
        {"sort_weight": 0.5},
        {"bound_power": 0.2},
    ]
    return tuple({**default, **change} for change in changes)


def _around(default: dict[str, Any], **values: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """The default, then as many other combinations of the values as there is room for."""
    points = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    return ({}, *[point for point in points if point != default][: SETTINGS - 1])


def _smooth_ap(temperature: float = 0.01) -> nn.Module:
    return AmongItself(DRSLoss(temperature, sort_weight=0, bound_power=None, distance=CosineSimilarity()))


class AmongItself(nn.Module):
    """A loss whose queries are among their own candidates."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor, indices: Any = None) -> Tensor:
        return self.loss(x, labels, indices, x.clone(), labels.clone())  # type: ignore[no-any-return]


def _raw() -> BaseDistance:
    return LpDistance(normalize_embeddings=False)


def _triplet_of_torchreid(margin: float = 0.3) -> nn.Module:
    """torchreid's triplet loss: hardest positive and negative by Euclidean distance of raw features, mean of all."""
    loss: nn.Module = losses.TripletMarginLoss(margin, distance=_raw(), reducer=reducers.MeanReducer())
    return loss


class Classifier(nn.Module):
    """Cross-entropy of a linear layer on normalised features; features before this layer are searched by (the neck of
    Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", CVPRW 2019)."""

    def __init__(self, num_classes: int, embedding_size: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(embedding_size), nn.Linear(embedding_size, num_classes, bias=False))
        nn.init.normal_(self.layers[1].get_parameter("weight"), std=0.001)
        self.label_smoothing = label_smoothing

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(x), labels, label_smoothing=self.label_smoothing)


def _weighted(make: Callable[..., nn.Module], grid: tuple[dict[str, Any], ...]) -> Candidate:
    return Candidate(make, grid, has_weights=True, lr=WEIGHTS_LR)


CANDIDATES: dict[str, Candidate] = {
    DRSL: Candidate(_drsl, _drsl_grid(), in_memory=True),
    SMALL_POWER: Candidate(_drsl, _small_power_grid(), in_memory=True),
    "SmoothAP": Candidate(_smooth_ap, _around({"temperature": 0.01}, temperature=(0.005, 0.02, 0.05, 0.1, 0.2))),
    "SmoothAP (PML)": Candidate(
        losses.SmoothAPLoss, _around({"temperature": 0.01}, temperature=(0.005, 0.02, 0.05, 0.1, 0.2))
    ),
    "FastAP": Candidate(losses.FastAPLoss, _around({"num_bins": 10}, num_bins=(5, 20, 30, 50, 100))),
    "RankedList": Candidate(
        lambda margin=0.4, Tn=10: losses.RankedListLoss(margin, Tn),
        _around({"margin": 0.4, "Tn": 10}, margin=(0.4, 0.2, 0.6), Tn=(0, 10)),
    ),
    "TripletMargin": Candidate(losses.TripletMarginLoss, _around({"margin": 0.05}, margin=(0.1, 0.2, 0.3, 0.5, 0.7))),
    "Triplet (torchreid)": Candidate(
        _triplet_of_torchreid,
        _around({"margin": 0.3}, margin=(0.05, 0.1, 0.5, 1.0, 2.0)),
        miner=lambda: miners.BatchHardMiner(distance=_raw()),
        in_memory=True,
    ),
    "MultiSimilarity": Candidate(
        losses.MultiSimilarityLoss,
        _around({"beta": 50, "base": 0.5}, beta=(50, 20), base=(0.5, 0.3, 0.7)),
        in_memory=True,
    ),
    "Circle": Candidate(
        losses.CircleLoss, _around({"m": 0.4, "gamma": 80}, m=(0.4, 0.25, 0.5), gamma=(80, 40)), in_memory=True
    ),
    "Contrastive": Candidate(
        losses.ContrastiveLoss,
        _around({"pos_margin": 0.0, "neg_margin": 1.0}, pos_margin=(0.0, 0.3), neg_margin=(0.6, 0.8, 1.0)),
        in_memory=True,
    ),
    "SupCon": Candidate(
        losses.SupConLoss, _around({"temperature": 0.1}, temperature=(0.03, 0.05, 0.2, 0.3, 0.5)), in_memory=True
    ),
    "NTXent": Candidate(losses.NTXentLoss, _around({"temperature": 0.07}, temperature=(0.03, 0.05, 0.1, 0.2, 0.5))),
    "ProxyAnchor": _weighted(
        losses.ProxyAnchorLoss, _around({"margin": 0.1, "alpha": 32}, margin=(0.1, 0.3), alpha=(32, 16, 64))
    ),
    "ArcFace": _weighted(
        losses.ArcFaceLoss, _around({"margin": 28.6, "scale": 64}, margin=(28.6, 11.5), scale=(64, 16, 32))
    ),
    "NormalizedSoftmax": _weighted(
        losses.NormalizedSoftmaxLoss,
        _around({"temperature": 0.05, "lr": 1e-2}, temperature=(0.05, 0.1, 0.2), lr=(1e-2, 1e-3)),
    ),
    CROSS_ENTROPY: Candidate(
        Classifier,
        # As many settings as other losses have settings and weights of cross-entropy beside them.
        ({}, *({"label_smoothing": s, "lr": lr} for s in (0.0, 0.1) for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2))),
        has_weights=True,
    ),
}
"""Every loss by its name in the tables. SmoothAP is as its authors define it: DRSL's own special case."""


def defaults(loss: str) -> dict[str, Any]:
    """The parameters with which a loss is used out of the box; empty for the defaults of its library."""
    return CANDIDATES[loss].grid[0]
