"""Compares two losses over seeds and test identities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import optimize, stats

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Difference:
    """How far one loss is ahead of another, in units of the score."""

    mean: float  # over the seeds
    low: float  # ends of the 95 % interval
    high: float
    p: float  # two-sided p-value of no difference
    seeds: int  # number of seeds that were compared


def compare(
    scores: Sequence[Sequence[float]], identities: Sequence[Sequence[int]], nested: bool = False,
    draws: int = 10_000, seed: int = 0,
) -> Difference:  # fmt: skip
    """A hierarchical bootstrap of paired differences, which takes both seeds and test identities for a sample.

    The mean difference has two parts. *Identities* are drawn with replacement, each with all of its queries:
    once for all seeds if every seed tests on the same people (``nested=False``), and for each seed by itself if every
    seed has people of its own. *Seeds* are too few to be drawn with replacement: an interval from three of them would
    be a fifth too narrow, and would not know how little three seeds tell about their spread. Their part
    therefore has Student's t distribution, with the standard deviation of the seeds' means. With ``nested``, this
    standard deviation holds the effect of the people too, whose variance is taken off. The two are added up exactly
    over the draws of identities, so that no p-value hangs on a few random numbers.

    If the identities do not differ, the interval is that of a paired t-test over the seeds. With one seed it has the
    part of the identities alone. One identity, the same for all seeds, tells nothing of others: the interval is
    infinite, and p is 1. ``scores`` and ``identities`` hold the difference and the identity of each query, for
    each seed.
    """
    sums, counts = _by_identity(scores, identities)
    means, number = sums.sum(1) / counts.sum(1), len(sums)
    if sums.shape[1] == 1 and not nested:
        return Difference(float(means.mean()), -np.inf, np.inf, 1.0, number)
    there = [np.ones(sums.shape[1], dtype=bool), *(counts > 0 if nested else ())]
    weights = _drawn(seed, draws, tuple(people.tobytes() for people in there))
    drawn = np.empty((number, draws))
    for row, (s, c) in enumerate(zip(sums, counts, strict=True)):
        of_seed = weights[1 + row if nested else 0].astype(float)
        drawn[row] = (of_seed @ s) / np.maximum(of_seed @ c, 1e-12)
    parts, scale = drawn.mean(0), 0.0
    if number > 1:
        variance = means.var(ddof=1) - (drawn.var(1).mean() if nested else 0)
        scale = float(np.sqrt(max(0.0, float(variance)) / number))
    if scale < 1e-12:  # Nothing but identities, and rounding.
        low, high = np.percentile(parts, [2.5, 97.5])
        below, above = ((1 + int(count.sum())) / (draws + 1) for count in (parts <= 0, parts >= 0))
    else:
        of_seeds = stats.t(number - 1, scale=scale)
        low, high = (_quantile(of_seeds, parts, share) for share in (0.025, 0.975))
        below, above = of_seeds.cdf(-parts).mean(), of_seeds.sf(-parts).mean()
    return Difference(float(means.mean()), float(low), float(high), min(1.0, 2 * float(min(below, above))), number)


def _quantile(of_seeds: Any, parts: Array, share: float) -> float:
    """The value below which a ``share`` of the sums of two independent parts lies, of which one is given by draws."""
    middle, room = of_seeds.ppf(share), abs(of_seeds.ppf(share))
    ends = middle + parts.min() - room, middle + parts.max() + room
    return float(optimize.brentq(lambda x: of_seeds.cdf(x - parts).mean() - share, *ends))


def _by_identity(scores: Sequence[Sequence[float]], identities: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Sum of the scores and number of the queries of each identity, both of shape (seeds, identities)."""
    rows = np.repeat(np.arange(len(scores)), [len(of_seed) for of_seed in scores])
    known, columns = np.unique(np.concatenate([np.asarray(of_seed) for of_seed in identities]), return_inverse=True)
    sums, counts = np.zeros((len(scores), len(known))), np.zeros((len(scores), len(known)))
    np.add.at(sums, (rows, columns), np.concatenate(scores))
    np.add.at(counts, (rows, columns), 1.0)
    return sums, counts


@lru_cache(maxsize=2)  # The losses of a table are compared on the same people.
def _drawn(seed: int, draws: int, there: tuple[bytes, ...]) -> list[np.ndarray[Any, Any]]:
    """How often each identity that is there, of which ``there`` has the bools as bytes, is drawn, for each of its
    entries; shape (draws, identities)."""
    rng, found = np.random.default_rng(seed), list[np.ndarray[Any, Any]]()
    for people in there:
        columns = np.flatnonzero(np.frombuffer(people, dtype=bool))
        drawn = np.zeros((draws, len(people)), dtype=np.uint16)
        places = rng.integers(len(columns), size=(draws, len(columns)))
        # Faster than a multinomial draw.
        drawn[:, columns] = [np.bincount(row, minlength=len(columns)) for row in places]
        found.append(drawn)
    return found


def holm(p: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm, Scandinavian Journal of Statistics 1979). The sorted p-values are
    multiplied by n, n - 1, ..., 1, and none is below the one before it."""
    order = np.argsort(p)
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p, dtype=float)[order] * factors))
    return [float(value) for value in corrected]
