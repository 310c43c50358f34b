"""The counting of ``fused.count_ahead`` as Triton kernels for CUDA, which always add in the same order.

No kernel writes a tensor of the size of the comparisons. Tests run the kernels on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
LOG_2 = tl.constexpr(math.log(2))


@triton.jit
def _count(z, x, query, count, slope, columns, BOUND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One pair: sums of the counts and of their slopes over the columns of the row of its query."""
    pair = tl.program_id(0).to(tl.int64)
    threshold = tl.load(x + pair)
    row = z + tl.load(query + pair) * columns
    sum_count = tl.zeros([BLOCK], dtype=x.dtype.element_ty)
    sum_slope = tl.zeros([BLOCK], dtype=x.dtype.element_ty)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        by = threshold - tl.load(row + column, mask=column < columns, other=float("inf"))
        ahead = tl.sigmoid(by)
        if BOUND:
            small = tl.exp(-tl.abs(by))
            # 1 + small rounds a small term away, which a bound of a small power needs: the Taylor series keeps it.
            series = small * (1 - small * (1 / 2 - small * (1 / 3 - small * (1 / 4 - small * (1 / 5 - small / 6)))))
            sum_count += (tl.maximum(by, 0) + tl.where(small < 0.01, series, tl.log(1 + small))) / LOG_2
            sum_slope += ahead / LOG_2
        else:
            sum_count += ahead
            sum_slope += ahead * (1 - ahead)
    tl.store(count + pair, tl.sum(sum_count, axis=0))
    tl.store(slope + pair, tl.sum(sum_slope, axis=0))


@triton.jit
def _gradient(z, x, grad, first, out, columns, BOUND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of columns of one row: minus the sum of the gradient times the slope over the pairs of the row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(z + row * columns + column, mask=column < columns, other=float("inf"))
    total = tl.zeros([BLOCK], dtype=x.dtype.element_ty)
    for pair in range(tl.load(first + row), tl.load(first + row + 1)):
        ahead = tl.sigmoid(tl.load(x + pair) - y)
        if BOUND:
            total -= tl.load(grad + pair) * ahead / LOG_2
        else:
            total -= tl.load(grad + pair) * ahead * (1 - ahead)
    tl.store(out + row * columns + column, total, mask=column < columns)


def count(z: Tensor, x: Tensor, query: Tensor, bound: bool = False) -> tuple[Tensor, Tensor]:
    """Counts and their slopes of each threshold, both of shape (E,).

    The count is the sum over c of ``G = sigmoid(x_e - z[query_e, c])``, with slope ``G * (1 - G)``. With ``bound`` it
    is the sum of ``log2(1 + exp(x_e - z[query_e, c]))``, with slope ``G / log(2)``. Distances ``z``, shape (Q, C),
    contiguous, and thresholds ``x``, shape (E,), of one type, are in units of the temperature; ``z`` is infinite for
    excluded candidates. ``query`` is the row of each threshold, shape (E,), int64, ascending."""
    counts, slopes = torch.empty_like(x), torch.empty_like(x)
    kernel: Any = _count
    with torch.cuda.device_of(z):  # Triton launches on the current device, which may be another.
        kernel[(len(x),)](z, x, query, counts, slopes, z.shape[1], BOUND=bound, BLOCK=BLOCK)
    return counts, slopes


def gradient(z: Tensor, x: Tensor, query: Tensor, grad: Tensor, bound: bool = False) -> Tensor:
    """The gradient of ``(grad * count).sum()`` in ``z``, shape (Q, C); ``grad`` has shape (E,). See ``count``."""
    out = torch.empty_like(z)
    first = torch.searchsorted(query, torch.arange(len(z) + 1, device=query.device))
    kernel: Any = _gradient
    with torch.cuda.device_of(z):
        grid = len(z), triton.cdiv(z.shape[1], BLOCK)
        kernel[grid](z, x, grad.contiguous(), first, out, z.shape[1], BOUND=bound, BLOCK=BLOCK)
    return out
