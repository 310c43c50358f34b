"""``functional.count_ahead`` on CUDA as one kernel forward and one backward, by Triton, which torch brings on Linux.

Neither writes anything of the size of the comparisons, and both always add in the same order. The eager path of
``functional`` is what they are tested against: they run on the CPU, too, in Triton's interpreter.
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
    """One pair: sums of what counts and of its slope over the columns of its query's row."""
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
            sum_count += (tl.maximum(by, 0) + tl.log(1 + tl.exp(-tl.abs(by)))) / LOG_2
            sum_slope += ahead / LOG_2
        else:
            sum_count += ahead
            sum_slope += ahead * (1 - ahead)
    tl.store(count + pair, tl.sum(sum_count, axis=0))
    tl.store(slope + pair, tl.sum(sum_slope, axis=0))


@triton.jit
def _gradient(z, x, grad, first, out, columns, BOUND: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of columns of one row: minus the sum of grad times the slope over the pairs of the row."""
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
    """Sums over c of ``G = sigmoid(x_e - z[query_e, c])``, and of its slope ``G * (1 - G)``, both of shape (E,); with
    ``bound``, of ``log2(1 + exp(x_e - z[query_e, c]))``, and of its slope ``G / log(2)``.

    Args:
        z: distances over temperature, shape (Q, C), contiguous; infinite for what does not count.
        x: thresholds over temperature, shape (E,), of the type of ``z``.
        query: row of each threshold, shape (E,), int64, ascending.
    """
    counts, slopes = torch.empty_like(x), torch.empty_like(x)
    kernel: Any = _count
    kernel[(len(x),)](z, x, query, counts, slopes, z.shape[1], BOUND=bound, BLOCK=BLOCK)
    return counts, slopes


def gradient(z: Tensor, x: Tensor, query: Tensor, grad: Tensor, bound: bool = False) -> Tensor:
    """Gradient of ``(grad * count).sum()`` in ``z``, shape (Q, C); arguments as in ``count``, ``grad`` shape (E,)."""
    out = torch.empty_like(z)
    first = torch.searchsorted(query, torch.arange(len(z) + 1, device=query.device))
    kernel: Any = _gradient
    shape = len(z), triton.cdiv(z.shape[1], BLOCK)
    kernel[shape](z, x, grad.contiguous(), first, out, z.shape[1], BOUND=bound, BLOCK=BLOCK)
    return out
