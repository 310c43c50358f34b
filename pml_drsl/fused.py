"""The fast count of DRSL's negatives, which never keeps all comparisons; tests compare it with ``functional``.

Symbols: Q queries, M candidates, K positives of a query, E (query, positive) pairs.
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

from pml_drsl.pairs import Pairs, SparseMask

# Elements of one block of comparisons on the CPU and on other devices: small enough for a CPU's cache, large enough
# to fill a GPU. It bounds the memory of `count_ahead` beyond its arguments.
CPU_BLOCK = 2**18
DEVICE_BLOCK = 2**26
DEPTH = 30
"""Temperatures behind a positive at which ``softplus(x)`` is ``exp(x)``, up to a relative error of 5e-14."""


def count_ahead(
    distances: Tensor, pairs: Pairs, temperature: float, margin: float = 0.0, bound: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The smoothed number of negatives that precede the positive of each of E pairs in the ranking of its query.

    With ``d_e`` the distance of the positive, ``count(e) = sum over n of G(d_e - d_n + margin)`` over the negatives of
    its query (the rank of Smooth-AP, Brown et al., ECCV 2020, eq. 5). The comparisons are made block by block, in the
    forward pass and again in the backward pass. Only comparisons that fit in one block of the CPU are kept.

    With ``bound``, ``B(x) = log2(1 + exp(x / temperature))`` stands in place of G. The logarithm of the count is then
    ``count.log() + shift``: a positive that is more than ``DEPTH`` temperatures ahead of all negatives is compared as
    if it were ``DEPTH`` ahead, where B is an exponential function, and the rest is its shift. A count of float32
    numbers would otherwise become 0.

    Returns ``(d, count, shift)``, each of shape (E,). The first two are differentiable (once) in ``distances``. The
    other arguments are those of ``functional.errors``.
    """
    return _CountAhead.apply(distances, _Settings(pairs, temperature, margin, bound))  # type: ignore[no-any-return]


class _Settings(NamedTuple):
    pairs: Pairs
    temperature: float
    margin: float
    bound: bool

    def raised(self, threshold: Tensor, z: Tensor, row: Tensor) -> Tensor:
        """Thresholds, in units of the temperature, that are no more than DEPTH ahead of the nearest in their row."""
        return torch.maximum(threshold, (z.amin(1) - DEPTH)[row]) if self.bound else threshold


class _Block(NamedTuple):
    """A range of the pairs and of their queries; the query of each pair, counted from the first of ``rows``; and ``x``,
    how far each pair is behind each candidate, in units of the temperature, shape (pairs, M). The next block reuses it.
    """

    pairs: slice
    rows: slice
    row: Tensor
    x: Tensor


class _CountAhead(torch.autograd.Function):
    # The distances of the pairs are gathered here, and not before, so that their gradient and that of the candidates
    # are one tensor. A second tensor of shape (Q, M), and the sum of the two, cost as much as the comparisons.
    @staticmethod
    def forward(ctx: Any, distances: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
        query, bound = settings.pairs.query, settings.bound
        d = distances[query, settings.pairs.positive]
        threshold = (d + settings.margin if settings.margin else d) / settings.temperature
        ctx.settings, ctx.kept, ctx.slope = settings, None, None
        kernels = _kernels(distances.device.type)
        if kernels is not None:
            z = _scaled(distances, settings)
            raised = settings.raised(threshold, z, query)
            count, ctx.slope = kernels.count(z, raised, query, bound)
        else:
            raised, count = torch.empty_like(d), torch.empty_like(d)
            for block in _blocks(distances, threshold, settings, raised):
                if distances.device.type == "cpu" and len(block.row) == len(query):
                    ctx.kept = block
                if bound:
                    ahead = torch.ops.aten.softplus.out(block.x, out=torch.empty_like(block.x) if ctx.kept else block.x)
                else:
                    ahead = block.x.sigmoid_()
                torch.sum(ahead, 1, out=count[block.pairs])
            if bound:
                count.div_(math.log(2))
        ctx.save_for_backward(distances, raised)
        shift = threshold - raised
        ctx.mark_non_differentiable(shift)
        return d, count, shift

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_d: Tensor, grad_count: Tensor, _: Tensor) -> tuple[Tensor, None]:
        distances, raised = ctx.saved_tensors
        settings = ctx.settings
        query, own = settings.pairs.query, settings.pairs.positive
        grad_count = grad_count / settings.temperature
        kernels = _kernels(distances.device.type)
        if kernels is not None:
            z = _scaled(distances, settings)
            grad_distances = kernels.gradient(z, raised, query, grad_count, settings.bound)
            grad_own = grad_count * ctx.slope
        else:
            grad_own, grad_distances = torch.empty_like(grad_d), torch.zeros_like(distances)
            for block in [ctx.kept] if ctx.kept else _blocks(distances, raised, settings):
                # The kept block is G, or for the bound the argument of G. A second backward pass needs it unchanged.
                if ctx.kept is None:
                    ahead = slope = block.x.sigmoid_()
                elif settings.bound:
                    ahead = slope = block.x.sigmoid()
                else:
                    ahead, slope = block.x, torch.empty_like(block.x)
                grad = grad_count[block.pairs, None]
                # G' = G * (1 - G) / temperature, B' = G / (temperature * log 2). G of an excluded candidate is 0.
                if settings.bound:
                    slope = ahead.mul_(grad / math.log(2))
                else:
                    torch.ops.aten.sigmoid_backward.grad_input(grad.expand_as(ahead), ahead, grad_input=slope)
                torch.sum(slope, 1, out=grad_own[block.pairs])
                grad_distances[block.rows].index_add_(0, block.row, slope, alpha=-1)
        grad_distances.index_put_((query, own), grad_d + grad_own, accumulate=True)
        return grad_distances, None


def _scaled(distances: Tensor, settings: _Settings) -> Tensor:
    """Distances in units of the temperature, shape (Q, M), infinite for what is no negative."""
    return settings.pairs.negatives.mask_excluded(distances.contiguous() / settings.temperature)


def _blocks(
    distances: Tensor, threshold: Tensor, settings: _Settings, raised: Tensor | None = None
) -> Iterator[_Block]:
    """The blocks of the pairs, in order, which share one buffer.

    ``threshold`` of each pair, shape (E,), is in units of the temperature. Raised thresholds are written into
    ``raised``, shape (E,); it is None if ``threshold`` has them.
    """
    query = settings.pairs.query
    size = CPU_BLOCK if distances.device.type == "cpu" else DEVICE_BLOCK
    step = min(len(query), max(1, size // max(1, distances.shape[1])))
    buffer = distances.new_empty(step, distances.shape[1])
    for pairs, rows, mask in _ranges(query, step, len(distances), settings.pairs.negatives):
        row = query[pairs] - rows.start if rows.start else query[pairs]
        z = mask.mask_excluded(distances[rows] / settings.temperature)
        x = threshold[pairs]
        if raised is not None:
            x = raised[pairs] = settings.raised(x, z, row)
        ahead = torch.index_select(z, 0, row, out=buffer[: len(row)])
        yield _Block(pairs, rows, row, torch.sub(x[:, None], ahead, out=ahead))


def _ranges(query: Tensor, step: int, num_queries: int, mask: SparseMask) -> Iterator[tuple[slice, slice, SparseMask]]:
    """Every ``step`` pairs: the range of the pairs, the range of their queries, and the negatives of these queries."""
    if step >= len(query):
        yield slice(0, len(query)), slice(0, num_queries), mask
        return
    starts = torch.arange(0, len(query), step, device=query.device)
    rows = torch.stack([query[starts], query[(starts + step).clamp_(max=len(query)) - 1] + 1])
    bounds = torch.cat([rows, torch.searchsorted(mask.query, rows)])
    for block, (first, last, *part) in enumerate(zip(*bounds.tolist(), strict=True)):
        yield slice(block * step, (block + 1) * step), slice(first, last), mask.part(slice(*part), slice(first, last))


@functools.cache
def _kernels(device_type: str) -> ModuleType | None:
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    kernels = importlib.import_module("pml_drsl.kernels")
    one = torch.zeros(1, device="cuda")
    try:
        kernels.count(one[:, None], one, one.long())
    except Exception as error:  # no C compiler, or a device that Triton does not know: the kernels can be done without
        warnings.warn(f"DRSL's CUDA kernels do not run here, so it takes the slower path: {error}", stacklevel=2)
        return None
    return kernels
