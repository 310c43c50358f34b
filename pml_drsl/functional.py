"""The definition of DRSL: the errors of a batch from its distances and pairs, in plain autograd.

For a query with positives P and negatives N, distances d and angular dissimilarities ``u = (1 - cos) / 2`` of its
candidates, and ``G(x) = sigmoid(x / temperature)``::

    rank_pos(i)  = 1 + sum over j in P, j != i of G(d_i - d_j)
    false_pos(i) = sum over n in N of G(d_i - d_n + margin)
    retrieval(i) = false_pos(i) / (rank_pos(i) + false_pos(i))
    sort(i)      = (u_i + sum over j in P, j != i of G(d_i - d_j) * u_j) / rank_pos(i)
    loss         = mean over queries of the mean over i in P of retrieval(i) + sort_weight * sort(i)

``1 - mean retrieval`` is the smoothed average precision of a query (Smooth-AP, Brown et al., ECCV 2020). ``sort`` is
the current sorting error of Rank & Sort Loss (Oksuz et al., ICCV 2021, eq. 5), with the angular dissimilarity as the
continuous label. The plan of two ranks is that of Xu et al. (ACM TOMM 2022).

The upper bound of the smoothed retrieval error takes ``odds(i) = false_pos(i) / rank_pos(i)``, with the logistic bound
of RankNet (Burges et al., ICML 2005), ``B(x) = log2(1 + exp(x / temperature))``, in place of G for the negatives::

    bound(i)     = log(1 + odds(i) ** p) / p

It is a softplus of the log odds, with the power p in (0, 1]. At p = 1 it is ``-log(1 - retrieval(i))``. A smaller p
gives a larger value, and a slope that falls more slowly as the odds fall: a pair whose order is right still moves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pml_drsl import fused
from pml_drsl.pairs import Pairs

Result = TypeVar("Result")
BLOCK = 2**20  # Comparisons of one block of queries, at most, if there is more than one query in it.


def errors(
    distances: Tensor,
    pairs: Pairs,
    temperature: float,
    margin: float = 0.0,
    bound_power: float | None = None,
    dissimilarity: Callable[[Tensor], Tensor] | None = None,
    use_fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The two errors of each (query, positive) pair; the module's docstring has the equations.

    The Q x K x M comparisons, K the largest number of positives of a query, are made a block of queries at a time, and
    again in the backward pass: memory is needed for the distances, Q x M, and one block.

    Args:
        distances: shape (Q, M), smaller is nearer.
        pairs: the positives and negatives of the Q queries.
        temperature: softness of the ranks, > 0, in units of distance.
        margin: distance by which a negative must follow a positive; any finite number.
        bound_power: power of the bound, in (0, 1]; None for the retrieval error itself.
        dissimilarity: gives the angular dissimilarity of each pair, in [0, 1], from its distance, both of shape (E,);
            None leaves the sort error out.
        use_fused: count the negatives by ``fused.count_ahead``, which is faster, and can be differentiated once.

    Returns ``(retrieval, sort)``, of shape (E,). Both are in [0, 1], but the bound has no upper limit.

    Raises InputError in the backward pass, with ``use_fused``, where a second derivative is asked for."""
    is_bound = bound_power is not None
    if use_fused:
        d, false_pos, shift = fused.count_ahead(distances, pairs, temperature, margin, is_bound)
    else:
        count = functools.partial(_count_ahead, temperature=temperature, margin=margin, bound=is_bound)
        d, false_pos, shift = _in_blocks(count, pairs, distances)
    cells, shape = (pairs.query, pairs.column), (len(distances), pairs.width)
    # The gradient of a learnable temperature must not meet the infinite peers: 0 times infinity is not a number.
    ranked, softness = (d / temperature, 1.0) if isinstance(temperature, Tensor) else (d, temperature)
    peers = d.new_full(shape, math.inf).index_put(cells, ranked)
    u = () if dissimilarity is None else (d.new_zeros(shape).index_put(cells, dissimilarity(d)),)
    rank_pos, *sort = _in_blocks(functools.partial(_rank_and_sort, temperature=softness), pairs, peers, *u)
    if bound_power is None:
        retrieval = false_pos / (rank_pos + false_pos)
    else:  # log(1 + odds ** p) / p
        retrieval = F.softplus(false_pos.log() + shift - rank_pos.log(), beta=bound_power)
    return retrieval, sort[0] if sort else None


def _count_ahead(
    pairs: Pairs, distances: Tensor, *, temperature: float, margin: float, bound: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``d_i``, ``false_pos(i)``, and the logarithm of its factor, without which a bound of tiny terms would be 0."""
    d = distances[pairs.query, pairs.positive]
    z = pairs.negatives.mask_excluded(distances / temperature)  # d_n, infinite for what is no negative
    x = ((d + margin) / temperature)[:, None] - z[pairs.query]
    if not bound:
        return d, torch.sigmoid(x).sum(1), torch.zeros_like(d)
    # Up to -DEPTH the softplus is the exponential function, up to rounding, so that a factor can be taken out.
    shift = (x.detach().amax(1) + fused.DEPTH).clamp(max=0)
    return d, F.softplus(x - shift[:, None]).sum(1) / math.log(2), shift


def _rank_and_sort(pairs: Pairs, peers: Tensor, u: Tensor | None = None, *, temperature: float) -> tuple[Tensor, ...]:
    """``rank_pos(i)``, and ``sort(i)`` if there are ``u``. A query has infinite ``peers`` where positives end."""
    d = peers[pairs.query, pairs.column]
    ahead = torch.sigmoid((d[:, None] - peers[pairs.query]) / temperature)  # G(d_i - d_j)
    # A positive is level with itself, G(0) = 1/2: the "1 +" and "j != i" of the definition together add 1/2.
    rank_pos = 0.5 + ahead.sum(1)
    if u is None:
        return (rank_pos,)
    return rank_pos, (0.5 * u[pairs.query, pairs.column] + (ahead * u[pairs.query]).sum(1)) / rank_pos


def _in_blocks(function: Callable[..., tuple[Tensor, ...]], pairs: Pairs, *matrices: Tensor) -> tuple[Tensor, ...]:
    """``function(pairs, *matrices)``, of shape (E,), a block of queries at a time, and again in the backward pass."""
    rows = max(1, BLOCK // max(1, pairs.width * matrices[0].shape[1]))
    if rows >= len(pairs.counts):
        return function(pairs, *matrices)
    blocks = zip(pairs.split(rows), *(matrix.split(rows) for matrix in matrices), strict=True)
    function = recomputed(function)
    results = [function(*block) for block in blocks]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def recomputed(function: Callable[..., Result]) -> Callable[..., Result]:
    """``function``, of which autograd keeps the arguments alone: the backward pass computes it again."""
    if torch._C._are_functorch_transforms_active():  # torch.func cannot compute it again
        return function
    return functools.partial(checkpoint, function, use_reentrant=False)
