"""Compares losses over test identities and over data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """How far one loss is ahead of another on a data set, in units of the score.

    Attributes:
        mean: mean difference over runs and test identities.
        low: lower end of the 95 % interval of a paired bootstrap over test identities.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    ours: Sequence[Sequence[float | None]], theirs: Sequence[Sequence[float | None]], draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Compares two losses by their scores of test identities.

    Args:
        ours: a row for each seed, with the score of each identity; None for an identity that was not tested.
        theirs: the same of the other loss: rows of the same seeds, in the same order.
        draws: how often the identities are drawn, with replacement; each draw takes an identity in all seeds at once.
        seed: of the draws.
    """
    differences = np.array(ours, dtype=float) - np.array(theirs, dtype=float)
    tested = ~np.isnan(differences)
    sums, counts = np.where(tested, differences, 0.0).sum(0), tested.sum(0)
    sums, counts = sums[counts > 0], counts[counts > 0]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    means = (weights @ sums) / (weights @ counts)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(sums.sum() / counts.sum()), float(low), float(high))


def mean_ranks(scores: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean rank of each loss over the data sets, 1 for the best; equal scores share their ranks (Demsar, "Statistical
    Comparisons of Classifiers over Multiple Data Sets", JMLR 2006).

    Args:
        scores: of each loss, one per data set.
    """
    if not scores:
        return {}
    ranks = rankdata(-np.array(list(scores.values())), axis=0)
    return dict(zip(scores, ranks.mean(1).tolist(), strict=True))
