"""Retrieval scores of features (mAP, mINP, CMC), re-ranking, and the command ``drsl-evaluate``."""

from typing import Literal

# The choices stand here, so that the command's ``--help`` need not import torch.

Metric = Literal["euclidean", "cosine"]
Ties = Literal["mean", "optimistic", "pessimistic"]
SearchProtocol = Literal["standard", "single-gallery-shot"]
METRICS: tuple[Metric, ...] = ("euclidean", "cosine")
TIES: tuple[Ties, ...] = ("mean", "optimistic", "pessimistic")
PROTOCOLS: tuple[SearchProtocol, ...] = ("standard", "single-gallery-shot")
# The ranks that are printed, and the identities that have no effect, where nothing else is asked for.
RANKS = (1, 5, 10, 20)
JUNK = (-1,)
