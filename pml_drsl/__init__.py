"""DRSL, the Differentiable Retrieval-Sort Loss, for pytorch-metric-learning."""

from pml_drsl.losses import DRSLoss
from pml_drsl.reducers import PerQueryReducer

__all__ = ["DRSLoss", "PerQueryReducer"]
