"""DRSL, the Differentiable Retrieval-Sort Loss, for pytorch-metric-learning."""

from pml_drsl.chunks import forward_in_chunks
from pml_drsl.large_batch import LargeBatch
from pml_drsl.losses import DRSLoss
from pml_drsl.miners import NegativeBudgetMiner, RankViolationMiner
from pml_drsl.reducers import PerIdentityReducer, PerQueryReducer

__all__ = [
    "DRSLoss",
    "LargeBatch",
    "NegativeBudgetMiner",
    "PerIdentityReducer",
    "PerQueryReducer",
    "RankViolationMiner",
    "forward_in_chunks",
]
