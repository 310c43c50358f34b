"""The mathematics of DRSL: pure functions of distances, pairs and a temperature.

Symbols: Q queries, M candidates, E (query, positive) pairs. ``G(x) = sigmoid(x / temperature)`` is the smoothed
indicator of ``x > 0``; ``G(d_i - d_j)`` says how much candidate j precedes candidate i in the ranking of their query.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Elements of one block of comparisons on the CPU and on other devices: small enough for a CPU's cache, large enough
# to fill a GPU. It bounds the memory of `count_ahead` beyond its arguments.
CPU_BLOCK = 2**18
DEVICE_BLOCK = 2**26


class Candidates(NamedTuple):
    """Which candidates of each query count, as pairs: a table of bool would cost a pass of its own.

    Attributes:
        query: of each listed pair, shape (L,), integer, ascending.
        candidate: candidate of each listed pair, shape (L,), integer; no pair twice.
        listed: whether the listed pairs are those that count, or all others are.
    """

    query: Tensor
    candidate: Tensor
    listed: bool

    def rows(self, rows: slice) -> Candidates:
        """Those of a range of queries, which then count from 0."""
        bounds = torch.tensor([rows.start, rows.stop], device=self.query.device, dtype=self.query.dtype)
        return self.part(slice(*torch.searchsorted(self.query, bounds).tolist()), rows.start)

    def part(self, pairs: slice, first_query: int) -> Candidates:
        """A range of the listed pairs, their queries counted from ``first_query``."""
        return Candidates(self.query[pairs] - first_query, self.candidate[pairs], self.listed)

    def only(self, y: Tensor) -> Tensor:
        """``y``, shape (Q, M), with infinity for what does not count: it precedes nothing, exactly. May reuse ``y``."""
        if not self.listed:
            return y.index_put_((self.query, self.candidate), y.new_tensor(torch.inf))
        return torch.full_like(y, torch.inf).index_put_((self.query, self.candidate), y[self.query, self.candidate])


def count_ahead(
    distances: Tensor,
    query: Tensor,
    own: Tensor,
    temperature: float,
    margin: float = 0.0,
    candidates: Candidates | None = None,
    weight: Tensor | None = None,
    bound: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """How many of a query's candidates precede each of E candidates of its own, smoothed.

    With ``d_e = distances[query_e, own_e]`` and c over the candidates that count::

        count(e)    = sum over c of G(d_e - d_c + margin)
        weighted(e) = sum over c of G(d_e - d_c + margin) * weight[query_e, c]

    (the rank of Smooth-AP, Brown et al., ECCV 2020, eq. 5). The E x C comparisons are made block by block, forward
    and again backward, so that nothing of their size is ever kept.

    Args:
        distances: of each query's candidates, shape (Q, C); an infinite one precedes nothing.
        query: query of each pair, shape (E,), integer, ascending.
        own: candidate of each pair, shape (E,), integer; no pair twice.
        temperature: softness of the comparison, > 0, in units of distance.
        margin: distance by which a candidate must follow not to count.
        candidates: which candidates count; None for all of them.
        weight: weight of each candidate, shape (Q, C); None leaves ``weighted`` out: it is then ``count``.
        bound: count with ``B(x) = log2(1 + exp(x / temperature))`` in place of G: no less than the true count, and its
            slope does not vanish for a candidate that is far ahead (the logistic bound of RankNet, Burges et al., ICML
            2005). Not with ``weight``.

    Returns:
        ``(d, count, weighted)``, each of shape (E,), differentiable (once) in ``distances`` and ``weight``.
    """
    out = _CountAhead.apply(distances, weight, query, own, candidates, temperature, margin, bound)
    d, count, *weighted = out
    return d, count, weighted[0] if weighted else count


class _CountAhead(torch.autograd.Function):
    # The pairs' own distances are gathered here, and not before, so that their gradient and the candidates' is one
    # tensor: a second one of shape (Q, C), and the sum of the two, cost as much as the comparisons.
    @staticmethod
    def forward(
        ctx: Any,
        distances: Tensor,
        weight: Tensor | None,
        query: Tensor,
        own: Tensor,
        candidates: Candidates | None,
        temperature: float,
        margin: float,
        bound: bool,
    ) -> tuple[Tensor, ...]:
        assert weight is None or not bound
        ctx.save_for_backward(distances, weight, query, own)
        ctx.settings = candidates, temperature, margin, bound
        d = distances[query, own]
        fused = _fused(distances, weight)
        if fused is not None:
            count, ctx.slope = fused.count(*_scaled(distances, d, candidates, temperature, margin), query, bound)
            return d, count
        count = torch.empty_like(d)
        weighted = None if weight is None else torch.empty_like(d)
        for pairs, rows, row, x in _blocks(distances, d, query, candidates, temperature, margin):
            ahead = F.softplus(x).div_(math.log(2)) if bound else x.sigmoid_()
            torch.sum(ahead, 1, out=count[pairs])
            if weight is not None and weighted is not None:
                torch.sum(ahead.mul_(weight[rows][row]), 1, out=weighted[pairs])
        return (d, count) if weighted is None else (d, count, weighted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_d: Tensor, grad_count: Tensor, *grad_weighted: Tensor) -> tuple[Tensor | None, ...]:
        distances, weight, query, own = ctx.saved_tensors
        candidates, temperature, margin, bound = ctx.settings
        d = distances[query, own]
        fused = _fused(distances, weight)
        if fused is not None:
            scaled = _scaled(distances, d, candidates, temperature, margin)
            grad_distances = fused.gradient(*scaled, query, grad_count / temperature, bound)
            grad_own = grad_count / temperature * ctx.slope
            grad_distances.index_put_((query, own), grad_d + grad_own, accumulate=True)
            return grad_distances, None, None, None, None, None, None, None
        grad_own, grad_distances = torch.empty_like(d), torch.zeros_like(distances)
        grad_weight = None if weight is None else torch.zeros_like(weight)
        for pairs, rows, row, x in _blocks(distances, d, query, candidates, temperature, margin):
            ahead = x.sigmoid_()
            grad = grad_count[pairs, None] / temperature
            if grad_weight is not None:
                of_weighted = grad_weighted[0][pairs, None]
                grad_weight[rows].index_add_(0, row, ahead * of_weighted)
                grad = grad + of_weighted / temperature * weight[rows][row]
            # G' = G * (1 - G) / temperature, B' = G / (temperature * log 2); what does not count has G = 0 and so none.
            if bound:
                slope = ahead.mul_(grad / math.log(2))
            else:
                slope = torch.ops.aten.sigmoid_backward.grad_input(grad.expand_as(ahead), ahead, grad_input=ahead)
            torch.sum(slope, 1, out=grad_own[pairs])
            grad_distances[rows].index_add_(0, row, slope, alpha=-1)
        grad_distances.index_put_((query, own), grad_d + grad_own, accumulate=True)
        return grad_distances, grad_weight, None, None, None, None, None, None


def _fused(distances: Tensor, weight: Tensor | None) -> ModuleType | None:
    """The module that does it in one kernel, where that is possible."""
    return _kernels() if distances.device.type == "cuda" and weight is None else None


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    fused = importlib.import_module("pml_drsl.fused")
    one = torch.zeros(1, device="cuda")
    try:
        fused.count(one[:, None], one, one.long())
    except Exception as error:  # no C compiler, or a device Triton does not know: the kernels are not indispensable
        warnings.warn(f"DRSL's CUDA kernels do not run here, so it takes the slower path: {error}", stacklevel=2)
        return None
    return fused


def _scaled(
    distances: Tensor, d: Tensor, candidates: Candidates | None, temperature: float, margin: float
) -> tuple[Tensor, Tensor]:
    """Distances, infinite for what does not count, and thresholds, in units of the temperature."""
    y = distances.contiguous() / temperature
    return y if candidates is None else candidates.only(y), (d + margin) / temperature


def _blocks(
    distances: Tensor, d: Tensor, query: Tensor, candidates: Candidates | None, temperature: float, margin: float
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Blocks of pairs: their slice, the slice of queries they are of, each one's row there, and how far each candidate
    is ahead, in units of the temperature, (pairs, C): the argument of the sigmoid in G.

    That is the caller's to overwrite until the next block.
    """
    size = CPU_BLOCK if distances.device.type == "cpu" else DEVICE_BLOCK
    step = min(len(query), max(1, size // max(1, distances.shape[1])))
    x = ((d + margin) / temperature)[:, None]
    buffer = distances.new_empty(step, distances.shape[1])
    for pairs, rows, of_rows in _ranges(query, step, len(distances), candidates):
        row = query[pairs] - rows.start
        y = distances[rows] / temperature
        if of_rows is not None:
            y = of_rows.only(y)
        ahead = torch.index_select(y, 0, row, out=buffer[: len(row)])
        yield pairs, rows, row, torch.sub(x[pairs], ahead, out=ahead)


def _ranges(
    query: Tensor, step: int, num_queries: int, candidates: Candidates | None
) -> Iterator[tuple[slice, slice, Candidates | None]]:
    """Every ``step`` pairs: their slice, the slice of queries they are of, and those queries' candidates."""
    if step >= len(query):
        yield slice(0, len(query)), slice(0, num_queries), candidates
        return
    starts = torch.arange(0, len(query), step, device=query.device)
    rows = torch.stack([query[starts], query[(starts + step).clamp_(max=len(query)) - 1] + 1])
    bounds = rows if candidates is None else torch.cat([rows, torch.searchsorted(candidates.query, rows)])
    for block, (first, last, *part) in enumerate(zip(*bounds.tolist(), strict=True)):
        of_rows = None if candidates is None else candidates.part(slice(*part), first)
        yield slice(block * step, (block + 1) * step), slice(first, last), of_rows


def self_distances(x: Tensor) -> Tensor:
    """Euclidean distances among N vectors, shape (N, N), of ``x``, shape (N, dim): those of ``torch.cdist(x, x)``.

    Differentiable (once). The gradient takes one matrix product instead of the two of ``torch.cdist``, which does not
    know that both its arguments are one: ``sum over j of (w_ij + w_ji) (x_i - x_j)``, w the gradient over the distance.
    Vectors at distance 0 give each other none.
    """
    return _SelfDistances.apply(x)  # type: ignore[no-any-return]


class _SelfDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        d = torch.cdist(x, x)
        ctx.save_for_backward(x, d)
        return d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, d = ctx.saved_tensors
        w = (grad / d).masked_fill_(d == 0, 0)
        w = w + w.T
        return torch.addmm(x * w.sum(1, keepdim=True), w, x, alpha=-1)


def retrieval_sort_errors(
    d: Tensor,
    false_pos: Tensor,
    query: Tensor,
    temperature: float,
    dissimilarity: Tensor | None = None,
    bound: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The two errors of DRSL for each (query, positive) pair.

    For a positive i of a query, with P its positives::

        rank_pos(i)  = 1 + sum over j in P, j != i of G(d_i - d_j)
        retrieval(i) = false_pos(i) / (rank_pos(i) + false_pos(i))
        sort(i)      = (u_i + sum over j in P, j != i of G(d_i - d_j) * u_j) / rank_pos(i)

    ``1 - mean retrieval`` over the positives of a query is its smoothed average precision (Brown et al., ECCV 2020);
    ``sort`` is the current sorting error of Rank & Sort (Oksuz et al., ICCV 2021, eq. 5) with the angular
    dissimilarity u as the continuous label.

    Args:
        d: distance of each pair's positive from its query, shape (E,); no pair twice.
        false_pos: smoothed number of negatives ahead of each positive, shape (E,): ``count_ahead`` of the negatives.
        query: query of each pair, shape (E,), integer, ascending.
        temperature: softness of the ranks, > 0, in units of distance.
        dissimilarity: angular dissimilarity ``u = (1 - cos) / 2`` of each pair, shape (E,), in [0, 1];
            None leaves the sort error out.
        bound: give ``log(1 + false_pos(i) / rank_pos(i))`` as the retrieval error: minus the log of the precision at i,
            no less than the error it stands for.

    Returns:
        ``(retrieval, sort)``, both of shape (E,) and in [0, 1], but for a bound, which has no upper limit; ``sort`` is
        None where ``dissimilarity`` is.
    """
    row, column, shape = _places(query)
    peers = d.new_full(shape, torch.inf).index_put((row, column), d)
    u = None if dissimilarity is None else d.new_zeros(shape).index_put((row, column), dissimilarity)
    _, ahead, u_ahead = count_ahead(peers, row, column, temperature, weight=u)
    # A positive is level with itself, G(0) = 1/2: the definition's "1 +" and "j != i" together add 1/2 to the count.
    rank_pos = 0.5 + ahead
    retrieval = torch.log1p(false_pos / rank_pos) if bound else false_pos / (rank_pos + false_pos)
    return retrieval, None if dissimilarity is None else (0.5 * dissimilarity + u_ahead) / rank_pos


def _places(query: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Row and column, each (E,), and the shape, of a table with a row per query that has pairs and a cell per pair."""
    _, row, counts = torch.unique_consecutive(query, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    column = torch.arange(len(query), device=query.device) - first[row]
    return row, column, (len(counts), int(counts.max()) if len(query) else 0)


def angular_dissimilarity(inner_product: Tensor, x_norm: Tensor, y_norm: Tensor) -> Tensor:
    """``u = (1 - cos) / 2`` of pairs of vectors from their inner products and norms, all of shape (E,).

    A zero vector has no angle; it counts as orthogonal to everything (u = 1/2) and gets no gradient.
    """
    norms = x_norm * y_norm
    defined = norms > 0
    return 0.5 - torch.where(defined, inner_product * (0.5 / torch.where(defined, norms, 1)), 0)
