"""Retrieval scores of features (mAP, mINP, CMC), re-ranking, and the command ``drsl-evaluate``."""

from typing import Literal, get_args

# The choices stand here, so that the command's ``--help`` need not import torch.

Metric = Literal["euclidean", "cosine"]
Ties = Literal["mean", "optimistic", "pessimistic"]
SearchProtocol = Literal["standard", "single-gallery-shot"]
METRICS: tuple[Metric, ...] = get_args(Metric)
TIES: tuple[Ties, ...] = get_args(Ties)
PROTOCOLS: tuple[SearchProtocol, ...] = get_args(SearchProtocol)
# The ranks that are printed, and the identities that have no effect, where nothing else is asked for.
RANKS = (1, 5, 10, 20)
JUNK = (-1,)
