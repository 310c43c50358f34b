"""The definition of DRSL as a function of dense matrices, with the equation of every line beside it, and its bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_COUNT = 1e-30
"""Below it, ``bound_of_odds`` has no gradient: that of ``odds ** power`` would be too large for float32."""


def drsl(
    distances: Tensor,
    positives: Tensor,
    negatives: Tensor,
    dissimilarity: Tensor,
    temperature: float,
    sort_weight: float,
    margin: float = 0.0,
    bound: bool = False,
    bound_power: float = 1.0,
) -> Tensor:
    """The loss of a batch, from the distances of Q queries to M candidates.

    This function is the definition. It is written to be read, and needs Q x M x M memory. ``DRSLoss`` gives the same
    value and the same gradient by the path of ``pml_drsl.fused``, which needs Q x M memory.

    ``1 - mean retrieval`` over the positives of a query is its smoothed average precision (Smooth-AP, Brown et al.,
    ECCV 2020). ``sort`` is the current sorting error of Rank & Sort Loss (Oksuz et al., ICCV 2021, eq. 5) with the
    angular dissimilarity as the continuous label. The plan of two ranks is that of Xu et al. (ACM TOMM 2022).

    Args:
        distances: shape (Q, M), smaller is nearer. Give a similarity with its sign changed.
        positives: shape (Q, M), bool: the candidates of the query's identity, without the query itself.
        negatives: shape (Q, M), bool: the candidates of other identities.
        dissimilarity: the angular dissimilarity ``u = (1 - cos) / 2`` of each pair, shape (Q, M), in [0, 1].
        temperature: softness of the ranks, > 0, in units of distance.
        sort_weight: weight of the sort error, >= 0.
        margin: distance by which a negative must follow a positive; any finite number.
        bound: replace the retrieval error by its upper bound, with ``B(x) = log2(1 + exp(x / temperature))``
            (the logistic bound of RankNet, Burges et al., ICML 2005) in place of G for the negatives.
        bound_power: power of the odds of the error in the bound, in (0, 1], see ``bound_of_odds``.

    Returns:
        The mean over queries that have a positive and a negative, shape (); 0 where no query has both.
    """
    difference = distances[:, :, None] - distances[:, None, :]  # d_i - d_j, shape (Q, M, M)
    peers = positives[:, None, :] & ~torch.eye(distances.shape[1], dtype=torch.bool, device=distances.device)  # j != i
    ahead = torch.sigmoid(difference / temperature) * peers  # G(d_i - d_j), for j in P, j != i
    x = (difference + margin) / temperature
    count = F.softplus(x) / math.log(2) if bound else torch.sigmoid(x)  # B(d_i - d_n + margin), or G of the same

    rank_pos = 1 + ahead.sum(2)  # 1 + sum over j of G(d_i - d_j)
    false_pos = (count * negatives[:, None, :]).sum(2)  # sum over n in N of G(d_i - d_n + margin)
    # 1 - the precision at i, or for the bound (of power 1) - log(the precision at i).
    retrieval = bound_of_odds(false_pos, rank_pos, bound_power) if bound else false_pos / (rank_pos + false_pos)
    sort = (dissimilarity + (ahead * dissimilarity[:, None, :]).sum(2)) / rank_pos  # mean u of the positives up to i

    terms = positives & negatives.any(1, keepdim=True)
    of_query = ((retrieval + sort_weight * sort) * terms).sum(1) / terms.sum(1).clamp(min=1)  # mean over i in P
    return of_query.sum() / terms.any(1).sum().clamp(min=1)


def bound_of_odds(false_pos: Tensor, rank_pos: Tensor, power: float = 1.0) -> Tensor:
    """The bound of the retrieval error, ``log(1 + odds ** power) / power`` with ``odds = false_pos / rank_pos``.

    The odds are those of the retrieval error, ``error = odds / (1 + odds)``. Power 1 gives ``-log(1 - error)``, minus
    the logarithm of the precision. A smaller power gives a larger value, because
    ``(1 + odds ** power) ** (1 / power) >= 1 + odds``, so it is an upper bound too. As the odds fall, its slope in
    ``log(odds)`` falls more slowly: a pair whose order is right already still moves.

    Args:
        false_pos: counts of negatives, >= 0. One below 1e-30 is taken for 1e-30, which has no gradient.
        rank_pos: ranks among the positives, of the same shape, > 0.
        power: in (0, 1].

    Returns:
        The bound, of the same shape, >= 0.
    """
    if power == 1:
        return torch.log1p(false_pos / rank_pos)
    # The slope in the odds is not finite at 0.
    log_odds = false_pos.clamp(min=LEAST_COUNT).log() - rank_pos.log()
    return F.softplus(power * log_odds) / power
