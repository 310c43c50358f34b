"""Reducers that average the losses of a batch by query or by identity."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.reducers import BaseReducer, ClassWeightedReducer, MeanReducer, PerAnchorReducer
from torch import Tensor

from pml_drsl.checks import InputError, check_arguments


class _QueryReducer(BaseReducer):
    """A reducer to which only the query of a pair or triplet matters; in PML's tuples it is the first index."""

    def _by_query(
        self, losses: Tensor, loss_indices: tuple[Tensor, ...], embeddings: Tensor, labels: Tensor | None
    ) -> Tensor:
        return self.element_reduction(losses, loss_indices[0], embeddings, labels)  # type: ignore[no-any-return]

    pos_pair_reduction = neg_pair_reduction = triplet_reduction = _by_query


class PerQueryReducer(_QueryReducer):
    """Averages the losses of each query, then reduces the queries that have one.

    Unlike PML's ``PerAnchorReducer`` it gives a query without a loss no weight, and the references may outnumber the
    batch (``ref_emb``, cross-batch memory). The elements of PML's ProxyAnchorLoss are proxies; each counts as a query.

    Args:
        reducer: reduces the averages of the queries, shape (queries with a loss,); None for a ``MeanReducer``. Raises
            InputError if it is no reducer of PML.
        **kwargs: arguments of ``BaseReducer``: ``collect_stats``."""

    def __init__(self, reducer: BaseReducer | None = None, **kwargs: Any) -> None:
        check_arguments(type(self), kwargs)
        super().__init__(**kwargs)
        if reducer is not None and not isinstance(reducer, BaseReducer):
            raise InputError(f"reducer must be one of pytorch_metric_learning.reducers, got {reducer!r}")
        self.reducer = MeanReducer() if reducer is None else reducer

    def element_reduction(
        self, losses: Tensor, loss_indices: Tensor, embeddings: Tensor, labels: Tensor | None
    ) -> Tensor:
        if len(losses) == 0:
            return self.zero_loss(embeddings)  # type: ignore[no-any-return]
        losses = _flat(losses)
        number = max(len(embeddings), len(losses))  # Proxies, one loss each, may outnumber the batch.
        # Without ``nonzero``, for which a GPU waits. The counts are whole numbers, exact in any order of adding.
        if type(self.reducer) is MeanReducer and not self.reducer.collect_stats:
            counts = losses.new_zeros(number).index_add_(0, loss_indices, torch.ones_like(losses))
            return (losses / counts[loss_indices]).sum() / (counts > 0).sum()
        averages, has_loss = _averages(losses, loss_indices, number)
        queries = has_loss.nonzero().squeeze(1)
        loss = {"losses": averages[queries], "indices": queries, "reduction_type": "element", "divisor": len(queries)}
        return self.reducer({"loss": loss}, embeddings, labels)  # type: ignore[no-any-return]


class PerIdentityReducer(_QueryReducer):
    """Every identity weighs the same, however many samples it has: the mean over the losses of each query, of these
    over the queries of each identity, and of these over the identities that have one. Raises InputError when the loss
    is called without labels.

    It is not for PML's ProxyAnchorLoss, whose losses are of proxies: it would take proxy i for query i."""

    def element_reduction(
        self, losses: Tensor, loss_indices: Tensor, embeddings: Tensor, labels: Tensor | None
    ) -> Tensor:
        if labels is None:
            raise InputError("PerIdentityReducer needs labels: call the loss with them, or give a PerQueryReducer")
        if len(losses) == 0:
            return self.zero_loss(embeddings)  # type: ignore[no-any-return]
        of_queries, has_loss = _averages(_flat(losses), loss_indices, len(embeddings))
        identities, identity = torch.unique(labels, return_inverse=True)
        of_identities, has_query = _averages(of_queries, identity, len(identities), has_loss)
        return of_identities.sum() / has_query.sum()


def _flat(losses: Tensor) -> Tensor:
    """Losses of shape (N,), which PML gives as (N, 1) too, in float32 or more: half precision counts no further than
    256 or 2,048."""
    return losses.to(torch.promote_types(losses.dtype, torch.float32)).reshape(-1)


def _averages(losses: Tensor, group: Tensor, number: int, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The average of the losses of each ``group``, or 0, and whether it has one. A loss not ``counted`` must be 0."""
    ones = torch.ones_like(losses) if counted is None else counted.to(losses)
    counts = losses.new_zeros(number).index_add_(0, group, ones)
    sums = losses.new_zeros(number).index_add(0, group, losses)
    return sums / counts.clamp(min=1), counts > 0


def check_reducer(reducer: torch.nn.Module, labels: Tensor | None, batch_size: int, num_refs: int) -> None:
    """Refuses, with an ``InputError``, a batch on which one of PML's reducers would fail without saying why."""
    for part in reducer.modules():
        if isinstance(part, PerAnchorReducer) and num_refs > batch_size:
            given = f"{num_refs} references of {batch_size} embeddings"
            raise InputError(f"PerAnchorReducer has no room for {given}; give a pml_drsl.reducers.PerQueryReducer")
        if isinstance(part, ClassWeightedReducer):
            if labels is None:
                raise InputError("ClassWeightedReducer needs labels: call the loss with them")
            low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
            if low < 0 or high >= len(part.weights):
                have = f"ClassWeightedReducer has weights for the labels 0 to {len(part.weights) - 1}"
                cure = "number the classes from 0 and weigh them all"
                raise InputError(f"{have}, and the batch has labels from {low} to {high}; {cure}")
