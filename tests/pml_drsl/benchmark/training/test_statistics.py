"""Comparisons of losses over test identities and over data sets."""

import numpy as np
import pytest
from scipy.stats import friedmanchisquare

from pml_drsl.benchmark.training.statistics import mean_ranks, paired_bootstrap


def test_the_interval_is_that_of_a_loop_over_draws():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(0.5, 0.2, (3, 40)), rng.normal(0.4, 0.2, (3, 40))
    ours[0, :10] = np.nan  # not tested with this seed
    means = []
    for _ in range(4000):
        drawn = rng.integers(0, 40, 40)
        means.append(np.nanmean((ours - theirs)[:, drawn]))
    found = paired_bootstrap(ours.tolist(), theirs.tolist())
    assert found.mean == pytest.approx(np.nanmean(ours - theirs))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.006)
    assert found.significant == (found.low > 0)


def test_an_identity_that_no_seed_tested_does_not_count():
    found = paired_bootstrap([[None, 3.0, 5.0], [None, None, 4.0]], [[None, 1.0, 4.0], [None, None, 4.0]])
    assert found.mean == 1.0 and 0 <= found.low <= found.high <= 2


def test_a_difference_that_all_identities_have_is_significant():
    found = paired_bootstrap([[2.0] * 10], [[1.0] * 10])
    assert found.significant and (found.mean, found.low, found.high) == (1, 1, 1)
    assert not paired_bootstrap([[1.0, 0.0] * 10], [[0.0, 1.0] * 10]).significant


def test_mean_ranks_are_demsars():
    scores = {"a": [0.9, 0.8, 0.7], "b": [0.9, 0.7, 0.9], "c": [0.1, 0.2, 0.3]}
    ranks = mean_ranks(scores)
    assert ranks == {"a": pytest.approx(4.5 / 3), "b": pytest.approx(4.5 / 3), "c": 3.0}
    # Friedman's statistic is a function of the mean ranks alone where no scores are equal.
    untied = {"a": [0.9, 0.8, 0.7, 0.6], "b": [0.8, 0.7, 0.9, 0.5], "c": [0.1, 0.2, 0.3, 0.7]}
    of = np.array(list(mean_ranks(untied).values()))
    n, k = 4, 3
    statistic = 12 * n / (k * (k + 1)) * ((of**2).sum() - k * (k + 1) ** 2 / 4)
    assert statistic == pytest.approx(friedmanchisquare(*untied.values()).statistic)
    assert mean_ranks({}) == {}
