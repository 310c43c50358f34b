"""The fast count of DRSL's negatives, which never keeps all comparisons; tests compare it with ``functional``."""

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

from pml_drsl.checks import InputError
from pml_drsl.pairs import Pairs

# Elements of a block of comparisons, which bounds the memory of `count_ahead`: to fit a CPU's cache, or to fill a GPU.
CPU_BLOCK, DEVICE_BLOCK = 2**18, 2**26
DEPTH = 30  # Temperatures behind a positive at which ``softplus(x)`` is ``exp(x)``, up to a relative error of 5e-14.


def count_ahead(
    distances: Tensor, pairs: Pairs, temperature: float, margin: float = 0.0, bound: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The smoothed number of negatives that precede the positive of each of E pairs in the ranking of its query.

    With ``d_e`` the distance of the positive, ``count(e) = sum over n of G(d_e - d_n + margin)`` over the negatives of
    its query (the rank of Smooth-AP, Brown et al., ECCV 2020, eq. 5). The comparisons are made block by block, and
    again in the backward pass, unless they fit in one block of the CPU.

    With ``bound``, ``B(x) = log2(1 + exp(x / temperature))`` stands in place of G, and the logarithm of the count is
    ``count.log() + shift``, because float32 counts would become 0: a positive more than ``DEPTH`` temperatures ahead of
    all negatives is compared as if it were ``DEPTH`` ahead, where B is an exponential function, and the rest is shift.

    Returns ``(d, count, shift)``, each of shape (E,). The first two are differentiable (once) in ``distances``. The
    other arguments are those of ``functional.errors``."""
    return _CountAhead.apply(distances, _Settings(pairs, temperature, margin, bound))  # type: ignore[no-any-return]


def check_once(what: str = "DRSLoss()", cure: str = "give fused=False") -> None:
    """To be called in the backward pass of an ``autograd.Function``: refuses a second derivative by an InputError.

    torch's ``once_differentiable`` refuses it only where autograd comes to the node of the gradient.
    ``torch.autograd.grad`` passes that node by, and would return a second derivative without this function's part."""
    if torch.is_grad_enabled():  # in a backward pass, with create_graph=True alone
        raise InputError(f"{what} can be differentiated once: for second derivatives (create_graph=True) {cure}")


class _Settings(NamedTuple):
    pairs: Pairs
    temperature: float
    margin: float
    bound: bool

    def raised(self, threshold: Tensor, z: Tensor, row: Tensor) -> Tensor:
        """Thresholds, in units of the temperature, that are no more than DEPTH ahead of the nearest in their row."""
        return torch.maximum(threshold, (z.amin(1) - DEPTH)[row]) if self.bound else threshold


class _CountAhead(torch.autograd.Function):
    # The distances of the pairs are gathered here, so that their gradient and that of the candidates are one tensor: a
    # second one of shape (Q, M), and the sum of the two, cost as much as the comparisons.
    @staticmethod
    def forward(ctx: Any, distances: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
        query, bound = settings.pairs.query, settings.bound
        d = distances[query, settings.pairs.positive]
        threshold = (d + settings.margin if settings.margin else d) / settings.temperature
        ctx.settings, ctx.slope, kept = settings, None, None
        kernels = _kernels(distances.device.type)
        if kernels is not None:
            z = _scaled(distances, settings)
            raised = settings.raised(threshold, z, query)
            count, ctx.slope = kernels.count(z, raised, query, bound)
        else:
            raised, count = torch.empty_like(d), torch.empty_like(d)
            for pairs, _, row, x in _blocks(distances, threshold, settings, raised):
                if distances.device.type == "cpu" and len(row) == len(query):
                    kept = x  # of the only block
                if bound:
                    ahead = torch.ops.aten.softplus.out(x, out=x if kept is None else torch.empty_like(x))
                else:
                    ahead = x.sigmoid_()
                torch.sum(ahead, 1, out=count[pairs])
            if bound:
                count.div_(math.log(2))
        ctx.save_for_backward(distances, raised, kept)  # A checkpoint frees ``kept``, which would stay in ctx.
        shift = threshold - raised
        ctx.mark_non_differentiable(shift)
        return d, count, shift

    @staticmethod
    def backward(ctx: Any, grad_d: Tensor, grad_count: Tensor, _: Tensor) -> tuple[Tensor, None]:
        check_once()
        distances, raised, kept = ctx.saved_tensors
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
            only = None if kept is None else [(slice(None), slice(None), query, kept)]
            for pairs, rows, row, x in only or _blocks(distances, raised, settings):
                # The kept block is G, or for the bound the argument of G. A second backward pass needs it unchanged.
                grad = grad_count[pairs, None]
                # G' = G * (1 - G) / temperature, B' = G / (temperature * log 2). G of an excluded candidate is 0.
                if settings.bound:
                    ahead = x.sigmoid() if only else x.sigmoid_()
                    slope = ahead.mul_(grad / math.log(2))
                else:
                    ahead = x if only else x.sigmoid_()
                    slope = torch.empty_like(ahead) if only else ahead
                    torch.ops.aten.sigmoid_backward.grad_input(grad.expand_as(ahead), ahead, grad_input=slope)
                torch.sum(slope, 1, out=grad_own[pairs])
                grad_distances[rows].index_add_(0, row, slope, alpha=-1)
        grad_distances.index_put_((query, own), grad_d + grad_own, accumulate=True)
        return grad_distances, None


def _scaled(distances: Tensor, settings: _Settings) -> Tensor:
    """Distances in units of the temperature, shape (Q, M), infinite for what is no negative."""
    return settings.pairs.negatives.mask_excluded(distances.contiguous() / settings.temperature)


def _blocks(
    distances: Tensor, threshold: Tensor, settings: _Settings, raised: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """The pairs of each block; their queries; the query of each pair among these; and how far each pair is behind each
    candidate, in units of the temperature, as ``threshold``, shape (pairs, M), which the next block overwrites. Raised
    thresholds are written into ``raised``; it is None if ``threshold`` has them."""
    query = settings.pairs.query
    size = CPU_BLOCK if distances.device.type == "cpu" else DEVICE_BLOCK
    step = min(len(query), max(1, size // max(1, distances.shape[1])))
    buffer, mask = distances.new_empty(step, distances.shape[1]), settings.pairs.negatives
    bounds = [[0, len(distances), 0, len(mask.query)]]  # of the queries of each block, and of their negatives
    if step < len(query):
        starts = torch.arange(0, len(query), step, device=query.device)
        edges = torch.stack([query[starts], query[(starts + step).clamp_(max=len(query)) - 1] + 1])
        bounds = torch.cat([edges, torch.searchsorted(mask.query, edges)]).T.tolist()
    for number, (first, last, *part) in enumerate(bounds):
        pairs, rows = slice(number * step, (number + 1) * step), slice(first, last)
        row = query[pairs] - first if first else query[pairs]
        negatives = mask if len(bounds) == 1 else mask.part(slice(*part), rows)
        z = negatives.mask_excluded(distances[rows] / settings.temperature)
        x = threshold[pairs]
        if raised is not None:
            x = raised[pairs] = settings.raised(x, z, row)
        ahead = torch.index_select(z, 0, row, out=buffer[: len(row)])
        yield pairs, rows, row, torch.sub(x[:, None], ahead, out=ahead)


@functools.cache
def _kernels(device_type: str) -> ModuleType | None:
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    kernels, one = importlib.import_module("pml_drsl.kernels"), torch.zeros(1, device="cuda")
    try:
        kernels.count(one[:, None], one, one.long())
    except Exception as error:  # no C compiler, or a device that Triton does not know: the kernels can be done without
        warnings.warn(f"DRSL's CUDA kernels do not run here, so it takes the slower path: {error}", stacklevel=2)
        return None
    return kernels
