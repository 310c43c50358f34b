"""How the errors of a batch become one number."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.reducers import BaseReducer, MeanReducer
from torch import Tensor


class PerQueryReducer(BaseReducer):
    """Averages the losses of each query, then reduces the queries that have one.

    Unlike PML's ``PerAnchorReducer`` it gives a query without a loss no weight, and the references may outnumber
    the batch (``ref_emb``, cross-batch memory).

    Args:
        reducer: reduces the queries' averages, one "element" each. Default: their mean.
    """

    def __init__(self, reducer: BaseReducer | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reducer = MeanReducer() if reducer is None else reducer

    def element_reduction(
        self, losses: Tensor, loss_indices: Tensor, embeddings: Tensor, labels: Tensor | None
    ) -> Tensor:
        if len(losses) == 0:
            return self.zero_loss(embeddings)  # type: ignore[no-any-return]
        queries, group = torch.unique(loss_indices, return_inverse=True)
        sums = losses.new_zeros(len(queries)).index_add(0, group, losses)
        averages = sums / torch.bincount(group).to(losses.dtype)
        loss_dict = {"loss": {"losses": averages, "indices": queries, "reduction_type": "element"}}
        return self.reducer(loss_dict, embeddings, labels)  # type: ignore[no-any-return]

    def _by_query(
        self, losses: Tensor, loss_indices: tuple[Tensor, ...], embeddings: Tensor, labels: Tensor | None
    ) -> Tensor:
        return self.element_reduction(losses, loss_indices[0], embeddings, labels)

    # In PML's pairs and triplets alike the first index is the query's.
    pos_pair_reduction = neg_pair_reduction = triplet_reduction = _by_query
