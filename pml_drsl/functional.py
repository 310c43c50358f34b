"""The mathematics of DRSL: pure functions of distances, masks and a temperature.

Symbols: Q queries, M candidates, E (query, positive) pairs. ``G(x) = sigmoid(x / temperature)`` is the smoothed
indicator of ``x > 0``; ``G(d_i - d_j)`` says how much candidate j precedes candidate i in the ranking of their query.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of one block of comparisons on the CPU and on other devices: small enough for a CPU's cache, large enough
# to fill a GPU. It bounds the memory of `count_ahead` beyond its arguments.
CPU_BLOCK = 2**18
DEVICE_BLOCK = 2**26


def count_ahead(
    x: Tensor, query: Tensor, y: Tensor, mask: Tensor, temperature: float, weight: Tensor | None = None
) -> Tensor:
    """How many of a query's candidates precede each of E thresholds, smoothed.

    ``count(e) = sum over c with mask[q, c] of weight[q, c] * G(x_e - y[q, c])``, with ``q = query[e]``
    (the rank of Smooth-AP, Brown et al., ECCV 2020, eq. 5). The E x C comparisons are made block by block, forward
    and again backward, so that nothing of their size is ever kept.

    Args:
        x: thresholds, shape (E,).
        query: row of ``y`` that each threshold is compared with, shape (E,), integer, ascending.
        y: distances of each query's candidates, shape (Q, C).
        mask: which candidates count, shape (Q, C), bool.
        temperature: softness of the comparison, > 0, in units of ``x`` and ``y``.
        weight: what each candidate counts for, shape (Q, C); 1 where not given.

    Returns:
        Counts, shape (E,), differentiable (once) in ``x``, ``y`` and ``weight``.
    """
    return _CountAhead.apply(x, query, y, mask, weight, temperature)  # type: ignore[no-any-return]


class _CountAhead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, query: Tensor, y: Tensor, mask: Tensor, weight: Tensor | None, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(x, query, y, mask, weight)
        ctx.temperature = temperature
        out = torch.empty_like(x)
        for pairs, rows in _blocks(query, y):
            row = query[pairs] - rows.start
            ahead = _ahead(x[pairs], row, y[rows], mask[rows], temperature)
            if weight is not None:
                ahead *= weight[rows][row]
            torch.sum(ahead, 1, out=out[pairs])
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, query, y, mask, weight = ctx.saved_tensors
        grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)
        grad_weight = None if weight is None else torch.zeros_like(weight)
        for pairs, rows in _blocks(query, y):
            row = query[pairs] - rows.start
            ahead = _ahead(x[pairs], row, y[rows], mask[rows], ctx.temperature)
            # G' = G * (1 - G) / temperature; a masked candidate has G = 0 and so no gradient.
            slope = torch.addcmul(ahead, ahead, ahead, value=-1)
            slope *= grad_out[pairs, None] / ctx.temperature
            if grad_weight is not None:
                grad_weight[rows].index_add_(0, row, ahead.mul_(grad_out[pairs, None]))
                slope *= weight[rows][row]
            torch.sum(slope, 1, out=grad_x[pairs])
            grad_y[rows].index_add_(0, row, slope, alpha=-1)
        return grad_x, None, grad_y, None, grad_weight, None


def _ahead(x: Tensor, row: Tensor, y: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """G(x - y) of a block, shape (len(x), C)."""
    # A candidate infinitely far away precedes nothing, exactly.
    candidates = (y / temperature).masked_fill_(~mask, torch.inf).index_select(0, row)
    return torch.sub((x / temperature)[:, None], candidates, out=candidates).sigmoid_()


def _blocks(query: Tensor, y: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the pairs, and of the rows of ``y`` they need, that keep a block of comparisons small."""
    size = CPU_BLOCK if y.device.type == "cpu" else DEVICE_BLOCK
    step = max(1, size // max(1, y.shape[1]))
    starts = range(0, len(query), step)
    first, last = query[::step].tolist(), query[[min(start + step, len(query)) - 1 for start in starts]].tolist()
    for start, first_row, last_row in zip(starts, first, last, strict=True):
        yield slice(start, start + step), slice(first_row, last_row + 1)


def retrieval_sort_errors(
    d: Tensor,
    query: Tensor,
    distances: Tensor,
    negatives: Tensor,
    temperature: float,
    margin: float = 0.0,
    dissimilarity: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The two errors of DRSL for each (query, positive) pair.

    For a positive i of a query, with P its positives and N its negatives::

        rank_pos(i)  = 1 + sum over j in P, j != i of G(d_i - d_j)
        false_pos(i) = sum over n in N of G(d_i - d_n + margin)
        retrieval(i) = false_pos(i) / (rank_pos(i) + false_pos(i))
        sort(i)      = (u_i + sum over j in P, j != i of G(d_i - d_j) * u_j) / rank_pos(i)

    ``1 - mean retrieval`` over the positives of a query is its smoothed average precision (Brown et al., ECCV 2020);
    ``sort`` is the current sorting error of Rank & Sort (Oksuz et al., ICCV 2021, eq. 5) with the angular
    dissimilarity u as the continuous label.

    Args:
        d: distance of each pair's positive from its query, shape (E,); no pair twice.
        query: query of each pair, shape (E,), ascending.
        distances: distance of each candidate from each query, shape (Q, M), smaller is nearer.
        negatives: negatives of each query, shape (Q, M), bool.
        temperature: softness of the ranks, > 0, in units of distance.
        margin: distance by which a negative must follow a positive not to count as ahead of it.
        dissimilarity: angular dissimilarity ``u = (1 - cos) / 2`` of each pair, shape (E,), in [0, 1];
            None leaves the sort error out.

    Returns:
        ``(retrieval, sort)``, both of shape (E,) and in [0, 1]; ``sort`` is None where ``dissimilarity`` is.
    """
    false_pos = count_ahead(d + margin, query, distances, negatives, temperature)
    peers = _Peers(query, len(distances))
    peer_distances, is_peer = peers.table(d), peers.table(torch.ones_like(query, dtype=torch.bool))
    # A positive is level with itself, G(0) = 1/2: the definition's "1 +" and "j != i" together add 1/2 to the count.
    rank_pos = 0.5 + count_ahead(d, query, peer_distances, is_peer, temperature)
    retrieval = false_pos / (rank_pos + false_pos)
    if dissimilarity is None:
        return retrieval, None
    u_ahead = count_ahead(d, query, peer_distances, is_peer, temperature, weight=peers.table(dissimilarity))
    return retrieval, (0.5 * dissimilarity + u_ahead) / rank_pos


class _Peers:
    """Lays one value per pair out as a table with a row per query, shape (Q, largest number of positives)."""

    def __init__(self, query: Tensor, num_queries: int) -> None:
        counts = torch.bincount(query, minlength=num_queries)
        first = counts.cumsum(0) - counts
        self.index = (query, torch.arange(len(query), device=query.device) - first[query])
        self.shape = (num_queries, int(counts.max()) if len(query) else 0)

    def table(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.shape).index_put(self.index, values)


def angular_dissimilarity(inner_product: Tensor, x_norm: Tensor, y_norm: Tensor) -> Tensor:
    """``u = (1 - cos) / 2`` of pairs of vectors from their inner products and norms, all of shape (E,).

    A zero vector has no angle; it counts as orthogonal to everything (u = 1/2) and gets no gradient.
    """
    norms = x_norm * y_norm
    defined = norms > 0
    cos = torch.where(defined, inner_product / torch.where(defined, norms, 1), 0)
    return (1 - cos) / 2
