"""Miners that choose the positives and negatives of each query."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from pytorch_metric_learning.distances import BatchedDistance
from pytorch_metric_learning.miners import BaseMiner
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor

from pml_drsl.checks import InputError, check_arguments, is_real, is_whole
from pml_drsl.machine import full_precision

Strategy = Literal["hard", "semihard", "random"]
FourIndices = tuple[Tensor, Tensor, Tensor, Tensor]


class RankingMiner(BaseMiner):
    """A miner that ranks the candidates of each query, by distances in full precision, and unlike PML's can be told
    which candidate is the query itself, in a cross-batch memory or among embeddings of other processes."""

    def __init__(self, **kwargs: Any) -> None:
        check_arguments(type(self), kwargs)
        super().__init__(**kwargs)
        if isinstance(self.distance, BatchedDistance):
            why = "a miner needs the matrix of distances, and BatchedDistance returns none"
            raise InputError(f"{why}; give the distance inside it, {self.distance.distance!r}")

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        own: Tensor | None = None,
    ) -> FourIndices:
        """Pairs (a1, p, a2, n), four integer tensors: a1 and p of shape (number of positive pairs,), a2 and n of shape
        (number of negative pairs,).

        Args:
            embeddings, labels: of the queries, shapes (Q, dim) and (Q,), integer labels.
            ref_emb, ref_labels: of the candidates, shapes (M, dim) and (M,). If ``ref_emb`` is None or the object
                ``embeddings``, no query is its own candidate. (PML decides by the object of the labels.)
            own: the candidate that is the query itself, shape (Q,), integer; needs ``ref_emb``.

        Raises InputError for ``ref_emb`` without ``ref_labels``, or the other way round."""
        if (ref_emb is None) != (ref_labels is None):
            given, missing = ("ref_labels", "ref_emb") if ref_emb is None else ("ref_emb", "ref_labels")
            raise InputError(f"{given} without {missing}: give both, or neither")
        self.reset_stats()
        with torch.no_grad():
            c_f.check_shapes(embeddings, labels)
            labels = c_f.to_device(labels, embeddings)
            ref_emb, ref_labels = c_f.set_ref_emb(embeddings, labels, ref_emb, ref_labels)
            positives = labels[:, None] == ref_labels
            negatives = ~positives
            if ref_emb is embeddings:
                own = torch.arange(len(labels), device=labels.device)
            if own is not None:
                positives[torch.arange(len(own), device=own.device), own] = False
            output = (torch.empty(0, dtype=torch.long, device=labels.device),) * 4
            if positives.numel() > 0:
                output = self.select(embeddings, ref_emb, positives, negatives)
        self.output_assertion(output)
        return output

    def select(self, embeddings: Tensor, ref_emb: Tensor, positives: Tensor, negatives: Tensor) -> FourIndices:
        """The pairs to keep of the positives and negatives, both of shape (Q, M), bool."""
        raise NotImplementedError


class RankViolationMiner(RankingMiner):
    """Keeps the violations of a ranking: the positives that some negative of their query precedes, and the negatives
    that precede some positive, as pairs (a1, p, a2, n). Works with any distance, ``ref_emb`` and cross-batch memory.

    Args:
        margin: any finite number. A negative n precedes a positive p of its query where ``d_n - d_p < margin``, in
            units of distance (for a similarity: ``s_p - s_n < margin``). Give one above 0 beside the bound of
            ``DRSLoss``, which also trains pairs whose order is right.
        **kwargs: arguments of ``BaseMiner``: ``distance`` (default: ``LpDistance``), ``collect_stats``. Another margin
            is an InputError.
    """

    def __init__(self, margin: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not is_real(margin):
            raise InputError(f"margin must be a finite number, got {margin!r}; 0 keeps violations of the order only")
        self.margin = float(margin)
        self.add_to_recordable_attributes(name="margin", is_stat=False)

    def select(self, embeddings: Tensor, ref_emb: Tensor, positives: Tensor, negatives: Tensor) -> FourIndices:
        d = _distances(self.distance, embeddings, ref_emb)
        nearest_negative = d.masked_fill(~negatives, torch.inf).amin(1, keepdim=True)
        farthest_positive = d.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)
        a1, p = (positives & (nearest_negative - d < self.margin)).nonzero(as_tuple=True)
        a2, n = (negatives & (d - farthest_positive < self.margin)).nonzero(as_tuple=True)
        return a1, p, a2, n

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


class NegativeBudgetMiner(RankingMiner):
    """Sets the imbalance of every query to a chosen value: it keeps the positives of a query, and
    ``round(negatives_per_positive * number of positives)`` of its negatives, at least one if there is one, as pairs
    (a1, p, a2, n). Works with any distance, ``ref_emb``, cross-batch memory and classes of any size.

    Args:
        negatives_per_positive: negatives kept for each positive, > 0, not necessarily a whole number.
        strategy: which negatives are kept. ``"hard"``: the nearest. ``"semihard"``: first the nearest of the negatives
            that are farther than the nearest positive of the query, then the farthest of the other negatives (after
            FaceNet, Schroff et al., CVPR 2015). ``"random"``: any, with equal probability.
        positives: positives kept for each query, drawn at random; None keeps all. With 1, the imbalance can exceed the
            number of identities.
        seed: seed of the draws, 0 or more; their number is part of the ``state_dict``. None: torch's global generator.
        **kwargs: arguments of ``BaseMiner``: ``distance`` (default: ``LpDistance``), ``collect_stats``. A value out of
            its range is an InputError.
    """

    def __init__(
        self,
        negatives_per_positive: float,
        strategy: Strategy = "hard",
        seed: int | None = None,
        positives: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not (is_real(negatives_per_positive) and negatives_per_positive > 0):
            raise InputError(f"negatives_per_positive must be a number above 0, got {negatives_per_positive!r}")
        if strategy not in get_args(Strategy):
            raise InputError(f"strategy must be one of {', '.join(get_args(Strategy))}, got {strategy!r}")
        if not (seed is None or (is_whole(seed) and seed >= 0)):
            raise InputError(f"seed must be None or an integer of at least 0, got {seed!r}")
        if not (positives is None or (is_whole(positives) and positives >= 1)):
            raise InputError(f"positives must be None or an integer of at least 1, got {positives!r}")
        self.negatives_per_positive, self.strategy = float(negatives_per_positive), strategy
        self.seed = None if seed is None else int(seed)
        self.positives = None if positives is None else int(positives)
        self.num_calls: Tensor
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))
        self.add_to_recordable_attributes(name="negatives_per_positive", is_stat=False)

    def select(self, embeddings: Tensor, ref_emb: Tensor, positives: Tensor, negatives: Tensor) -> FourIndices:
        if self.positives is not None:  # a random choice of the positives of each query
            cost = self._random(len(positives), positives.shape[1], positives.device).masked_fill(~positives, torch.inf)
            chosen = cost.topk(min(self.positives, positives.shape[1]), largest=False).indices
            positives = positives & torch.zeros_like(positives).scatter_(1, chosen, True)
        num_positives = positives.sum(1)
        budget = (self.negatives_per_positive * num_positives).round().clamp(min=1).minimum(negatives.sum(1))
        budget = torch.where(num_positives > 0, budget, 0).long()
        largest = int(budget.max())
        # All other candidates have infinite cost, so that the negatives come first, even those at a distance of NaN.
        cost = self._cost(embeddings, ref_emb, positives)
        cost = cost.nan_to_num(torch.finfo(cost.dtype).max).masked_fill(~negatives, torch.inf)
        chosen = cost.topk(largest, largest=False).indices
        a2, place = (torch.arange(largest, device=chosen.device) < budget[:, None]).nonzero(as_tuple=True)
        a1, p = positives.nonzero(as_tuple=True)
        return a1, p, a2, chosen[a2, place]

    def _cost(self, embeddings: Tensor, ref_emb: Tensor, positives: Tensor) -> Tensor:
        """The cost of keeping each candidate, shape (Q, M); NaN if its distance is. Negatives of low cost are kept."""
        if self.strategy == "random":
            return self._random(len(embeddings), len(ref_emb), embeddings.device)
        d = _distances(self.distance, embeddings, ref_emb)
        if self.strategy == "hard":
            return d
        nearest_positive = d.masked_fill(~positives, torch.inf).amin(1, keepdim=True)
        beyond = d - torch.where(positives.any(1, keepdim=True), nearest_positive, 0)
        return torch.where(beyond > 0, beyond, beyond.abs().amax(1, keepdim=True) - beyond + 1)

    def _random(self, rows: int, columns: int, device: torch.device) -> Tensor:
        if self.seed is None:
            return torch.rand(rows, columns, device=device)
        # A generator of its own for each call, on the CPU: the same draws on every device and in a restored run.
        (mixed,) = np.random.SeedSequence((self.seed, int(self.num_calls))).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed))
        self.num_calls += 1
        return torch.rand(rows, columns, generator=generator, device="cpu").to(device)

    def extra_repr(self) -> str:
        names = ("negatives_per_positive", "strategy", "seed", "positives")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _distances(distance: torch.nn.Module, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
    """Distance matrix, shape (Q, M), smaller is nearer; half precision is computed in float32."""
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, ref_emb.dtype), torch.float32)
    with full_precision(embeddings.device.type):
        mat: Tensor = distance(embeddings.to(dtype), None if ref_emb is embeddings else ref_emb.to(dtype))
    return -mat if distance.is_inverted else mat
