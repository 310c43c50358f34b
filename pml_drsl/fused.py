"""The fast path of DRSL: ranks are counted block by block, so that the Q x K x M comparisons are never kept.

Symbols: Q queries, M candidates, K positives of a query, E (query, positive) pairs. ``G(x) = sigmoid(x / temperature)``
is the smoothed indicator of ``x > 0``; ``G(d_i - d_j)`` says how much candidate j precedes candidate i in the ranking
of their query. Tests compare this path with the definition, ``functional.drsl``.
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

from pml_drsl.functional import bound_of_odds
from pml_drsl.pairs import Pairs, SparseMask

# Elements of one block of comparisons on the CPU and on other devices: small enough for a CPU's cache, large enough
# to fill a GPU. It bounds the memory of `count_ahead` beyond its arguments.
CPU_BLOCK = 2**18
DEVICE_BLOCK = 2**26


def count_ahead(
    distances: Tensor,
    query: Tensor,
    own: Tensor,
    temperature: float,
    margin: float = 0.0,
    mask: SparseMask | None = None,
    weight: Tensor | None = None,
    bound: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The smoothed number of candidates that precede each of E given candidates in the ranking of their query.

    With ``d_e = distances[query_e, own_e]``, and the sums over the candidates c that the mask contains::

        count(e)    = sum over c of G(d_e - d_c + margin)
        weighted(e) = sum over c of G(d_e - d_c + margin) * weight[query_e, c]

    (the rank of Smooth-AP, Brown et al., ECCV 2020, eq. 5). The E x C comparisons are made block by block, in the
    forward pass and again in the backward pass. Only comparisons that fit in one block of the CPU are kept.

    Args:
        distances: distances of the candidates of each query, shape (Q, C); an infinite one precedes nothing.
        query: query of each pair, shape (E,), integer, ascending.
        own: candidate of each pair, shape (E,), integer. No pair occurs twice.
        temperature: softness of the comparison, in units of distance. It is > 0 for distances. With -temperature and
            -margin, ``distances`` may be similarities: nearer candidates then have larger values. This saves two passes
            over the matrix that its negative would take.
        margin: a candidate counts unless it follows by at least this distance.
        mask: the candidates that count; None for all candidates.
        weight: weight of each candidate, shape (Q, C). Without it, ``weighted`` is ``count``.
        bound: count with ``B(x) = log2(1 + exp(x / temperature))`` in place of G. B is at least the true count, and its
            slope does not vanish for a candidate that is far ahead (the logistic bound of RankNet, Burges et al.,
            ICML 2005). Not with ``weight``.

    Returns:
        ``(d, count, weighted)``, each of shape (E,), differentiable (once) in ``distances`` and ``weight``.
    """
    settings = _Settings(mask, temperature, margin, bound)
    d, count, *weighted = _CountAhead.apply(distances, weight, query, own, settings)
    return d, count, weighted[0] if weighted else count


def retrieval_and_sort_errors(
    d: Tensor,
    false_pos: Tensor,
    pairs: Pairs,
    temperature: float,
    dissimilarity: Tensor | None,
    bound: bool = False,
    bound_power: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """The two errors of each (query, positive) pair, as ``functional.drsl`` defines them.

    Args:
        d: distance of each pair's positive from its query, shape (E,); a similarity with ``-temperature``.
        false_pos: smoothed number of negatives ahead of each positive, shape (E,).
        pairs: the pairs.
        temperature: softness of the ranks, in units of distance, as in ``count_ahead``.
        dissimilarity: angular dissimilarity ``u = (1 - cos) / 2`` of each pair, shape (E,), in [0, 1]; None leaves the
            sort error out.
        bound: return the upper bound of the retrieval error, ``functional.bound_of_odds``.
        bound_power: power of the odds in the bound, in (0, 1].

    Returns:
        ``(retrieval, sort)``, both of shape (E,). Both are in [0, 1], but the bound has no upper limit. ``sort`` is
        None if ``dissimilarity`` is.
    """
    cells, shape = (pairs.query, pairs.column), (len(pairs.counts), pairs.width)
    peers = d.new_full(shape, math.copysign(math.inf, temperature)).index_put(cells, d)
    u = None if dissimilarity is None else d.new_zeros(shape).index_put(cells, dissimilarity)
    _, ahead, u_ahead = count_ahead(peers, *cells, temperature, weight=u)
    # A positive is level with itself, G(0) = 1/2: the "1 +" and "j != i" of the definition together add 1/2.
    rank_pos = 0.5 + ahead
    retrieval = bound_of_odds(false_pos, rank_pos, bound_power) if bound else false_pos / (rank_pos + false_pos)
    return retrieval, None if dissimilarity is None else (0.5 * dissimilarity + u_ahead) / rank_pos


class _Settings(NamedTuple):
    mask: SparseMask | None
    temperature: float
    margin: float
    bound: bool

    def scaled(self, distances: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Distances, infinite for excluded candidates, and thresholds, both in units of the temperature."""
        y = distances.contiguous() / self.temperature
        return y if self.mask is None else self.mask.mask_excluded(y), self.thresholds(d)

    def thresholds(self, d: Tensor) -> Tensor:
        return (d + self.margin if self.margin else d) / self.temperature


class _Block(NamedTuple):
    """A range of the pairs, and what is computed for it.

    Attributes:
        pairs: the range of the pairs.
        rows: the range of the queries of these pairs.
        row: query of each pair, shape (pairs,), counted from the first of ``rows``.
        x: how far each candidate is ahead of each pair, in units of the temperature, shape (pairs, C): the argument
            of the sigmoid in G. It may be modified in place until the next block is made.
    """

    pairs: slice
    rows: slice
    row: Tensor
    x: Tensor


class _CountAhead(torch.autograd.Function):
    # The distances of the pairs are gathered here, and not before, so that their gradient and that of the candidates
    # are one tensor. A second tensor of shape (Q, C), and the sum of the two, cost as much as the comparisons.
    @staticmethod
    def forward(
        ctx: Any, distances: Tensor, weight: Tensor | None, query: Tensor, own: Tensor, settings: _Settings
    ) -> tuple[Tensor, ...]:
        assert weight is None or not settings.bound
        ctx.save_for_backward(distances, weight, query, own)
        ctx.settings, ctx.kept = settings, None
        d = distances[query, own]
        kernels = _kernels_for(distances, weight)
        if kernels is not None:
            count, ctx.slope = kernels.count(*settings.scaled(distances, d), query, settings.bound)
            return d, count
        count = torch.empty_like(d)
        weighted = None if weight is None else torch.empty_like(d)
        for block in _blocks(distances, d, query, settings):
            if distances.device.type == "cpu" and len(block.row) == len(query):
                ctx.kept = block
            if settings.bound:
                ahead = torch.ops.aten.softplus.out(block.x, out=torch.empty_like(block.x) if ctx.kept else block.x)
            else:
                ahead = block.x.sigmoid_()
            torch.sum(ahead, 1, out=count[block.pairs])
            if weight is not None and weighted is not None:
                torch.sum(ahead * weight[block.rows][block.row], 1, out=weighted[block.pairs])
        if settings.bound:
            count.div_(math.log(2))
        return (d, count) if weighted is None else (d, count, weighted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_d: Tensor, grad_count: Tensor, *grad_weighted: Tensor) -> tuple[Tensor | None, ...]:
        distances, weight, query, own = ctx.saved_tensors
        settings = ctx.settings
        grad_count = grad_count / settings.temperature
        grad_weight = None if weight is None else torch.zeros_like(weight)
        kernels = _kernels_for(distances, weight)
        if kernels is not None:
            scaled = settings.scaled(distances, distances[query, own])
            grad_distances = kernels.gradient(*scaled, query, grad_count, settings.bound)
            grad_own = grad_count * ctx.slope
        else:
            grad_own, grad_distances = torch.empty_like(grad_d), torch.zeros_like(distances)
            blocks = [ctx.kept] if ctx.kept else _blocks(distances, distances[query, own], query, settings)
            for block in blocks:
                # The kept block is G, or for the bound the argument of G. A second backward pass needs it unchanged.
                if ctx.kept is None:
                    ahead = slope = block.x.sigmoid_()
                elif settings.bound:
                    ahead = slope = block.x.sigmoid()
                else:
                    ahead, slope = block.x, torch.empty_like(block.x)
                grad = grad_count[block.pairs, None]
                if weight is not None and grad_weight is not None:
                    of_weighted = grad_weighted[0][block.pairs, None]
                    grad_weight[block.rows].index_add_(0, block.row, ahead * of_weighted)
                    grad = grad + of_weighted / settings.temperature * weight[block.rows][block.row]
                # G' = G * (1 - G) / temperature, B' = G / (temperature * log 2). G of an excluded candidate is 0.
                if settings.bound:
                    slope = ahead.mul_(grad / math.log(2))
                else:
                    torch.ops.aten.sigmoid_backward.grad_input(grad.expand_as(ahead), ahead, grad_input=slope)
                torch.sum(slope, 1, out=grad_own[block.pairs])
                grad_distances[block.rows].index_add_(0, block.row, slope, alpha=-1)
        grad_distances.index_put_((query, own), grad_d + grad_own, accumulate=True)
        return grad_distances, grad_weight, None, None, None


def _blocks(distances: Tensor, d: Tensor, query: Tensor, settings: _Settings) -> Iterator[_Block]:
    """The blocks of the pairs, in order. They share one buffer."""
    size = CPU_BLOCK if distances.device.type == "cpu" else DEVICE_BLOCK
    step = min(len(query), max(1, size // max(1, distances.shape[1])))
    x = settings.thresholds(d)[:, None]
    buffer = distances.new_empty(step, distances.shape[1])
    for pairs, rows, mask in _ranges(query, step, len(distances), settings.mask):
        row = query[pairs] - rows.start if rows.start else query[pairs]
        y = distances[rows] / settings.temperature
        if mask is not None:
            y = mask.mask_excluded(y)
        ahead = torch.index_select(y, 0, row, out=buffer[: len(row)])
        yield _Block(pairs, rows, row, torch.sub(x[pairs], ahead, out=ahead))


def _ranges(
    query: Tensor, step: int, num_queries: int, mask: SparseMask | None
) -> Iterator[tuple[slice, slice, SparseMask | None]]:
    """Every ``step`` pairs: the range of the pairs, the range of their queries, and the mask of these queries."""
    if step >= len(query):
        yield slice(0, len(query)), slice(0, num_queries), mask
        return
    starts = torch.arange(0, len(query), step, device=query.device)
    rows = torch.stack([query[starts], query[(starts + step).clamp_(max=len(query)) - 1] + 1])
    bounds = rows if mask is None else torch.cat([rows, torch.searchsorted(mask.query, rows)])
    for block, (first, last, *part) in enumerate(zip(*bounds.tolist(), strict=True)):
        of_rows = None if mask is None else mask.part(slice(*part), slice(first, last))
        yield slice(block * step, (block + 1) * step), slice(first, last), of_rows


def _kernels_for(distances: Tensor, weight: Tensor | None) -> ModuleType | None:
    """The Triton kernels, if they can do the work."""
    return _kernels() if distances.device.type == "cuda" and weight is None else None


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    kernels = importlib.import_module("pml_drsl.kernels")
    one = torch.zeros(1, device="cuda")
    try:
        kernels.count(one[:, None], one, one.long())
    except Exception as error:  # no C compiler, or a device that Triton does not know: the kernels can be done without
        warnings.warn(f"DRSL's CUDA kernels do not run here, so it takes the slower path: {error}", stacklevel=2)
        return None
    return kernels
