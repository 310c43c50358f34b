"""DRSL, the Differentiable Retrieval-Sort Loss, for pytorch-metric-learning."""

from pml_drsl.losses import DRSLoss
from pml_drsl.miners import NegativeBudgetMiner, RankViolationMiner
from pml_drsl.reducers import PerIdentityReducer, PerQueryReducer

__all__ = ["DRSLoss", "NegativeBudgetMiner", "PerIdentityReducer", "PerQueryReducer", "RankViolationMiner"]
