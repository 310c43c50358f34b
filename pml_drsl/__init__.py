"""DRSL, the Differentiable Retrieval-Sort Loss, for pytorch-metric-learning."""

import importlib.metadata

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


def __getattr__(name: str) -> str:
    if name == "__version__":
        return importlib.metadata.version("pml-drsl")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
