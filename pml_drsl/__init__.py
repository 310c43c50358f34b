"""DRSL, the Differentiable Retrieval-Sort Loss, for pytorch-metric-learning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pml_drsl.large_batch import LargeBatch, forward_in_chunks
    from pml_drsl.losses import DRSLoss
    from pml_drsl.miners import NegativeBudgetMiner, RankViolationMiner
    from pml_drsl.reducers import PerIdentityReducer, PerQueryReducer

    __version__: str

__all__ = [
    "DRSLoss",
    "LargeBatch",
    "NegativeBudgetMiner",
    "PerIdentityReducer",
    "PerQueryReducer",
    "RankViolationMiner",
    "forward_in_chunks",
]
_MODULES = ("losses", "miners", "reducers", "large_batch")


def _imported(name: str) -> Any:
    # Importing torch takes seconds, which `pml_drsl.checks` and the help text of a command can do without.
    if name == "__version__":
        return importlib.import_module(f"{__name__}.console").version()
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        modules = (importlib.import_module(f"{__name__}.{module}") for module in _MODULES)
        return next(vars(module)[name] for module in modules if name in vars(module))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not TYPE_CHECKING:  # A type checker that sees this function allows every name.
    __getattr__ = _imported


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
