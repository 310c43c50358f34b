"""The distance that DRSL ranks by where no other is given."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import LpDistance
from torch import Tensor

from pml_drsl import functional


class EuclideanDistance(LpDistance):
    """``LpDistance(p=2)`` with a cheaper gradient where a batch is compared with itself; the values are the same.

    Args:
        **kwargs: of ``LpDistance``: ``normalize_embeddings`` (default: True), ``power``, ``collect_stats``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(p=2, **kwargs)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        if ref_emb is query_emb and query_emb.dtype in (torch.float32, torch.float64):
            return functional.self_distances(query_emb)
        return super().compute_mat(query_emb, ref_emb)  # type: ignore[no-any-return]
