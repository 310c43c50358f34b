"""The comparison of two losses against Student's t-test, and its coverage in simulations."""

import numpy as np
import pytest
from scipy import stats

from torchreid_ext.benchmark.statistics import compare, holm


@pytest.mark.parametrize(("seeds", "nested"), [(3, False), (5, True)])
def test_without_differences_between_identities_it_is_the_t_test_over_seeds(seeds, nested):
    means = np.random.default_rng(seeds).normal(0.02, 0.01, seeds)
    found = compare([[mean] * 5 for mean in means], [range(5)] * seeds, nested, draws=100)
    test = stats.ttest_1samp(means, 0)
    low, high = test.confidence_interval()
    assert found.mean == pytest.approx(means.mean())
    assert (found.low, found.high, found.p) == pytest.approx((low, high, test.pvalue), rel=1e-6)


def test_the_two_parts_add_up_as_in_many_draws_of_both():
    rng = np.random.default_rng(3)
    rows = rng.normal(0.4, 0.3, (3, 1)) + rng.normal(0, 3, 60) + rng.normal(0, 1, (3, 60))
    found = compare(rows, [range(60)] * 3)
    people = rng.choice(rows.mean(0), (400_000, 60)).mean(1)
    sums = people + rows.mean(1).std(ddof=1) / 3**0.5 * stats.t.rvs(2, size=400_000, random_state=rng)
    assert (found.low, found.high) == pytest.approx(np.percentile(sums, [2.5, 97.5]), rel=0.03)
    assert found.p == pytest.approx(2 * (sums <= 0).mean(), rel=0.05)


def test_without_any_difference_there_is_an_interval():
    """Rounding makes the spread of seven equal means a little more than 0."""
    found = compare([[0.7] * 3] * 7, [range(3)] * 7)
    assert (found.low, found.mean, found.high) == pytest.approx((0.7, 0.7, 0.7))


def test_one_identity_tells_nothing_of_others():
    found = compare([[0.1, 0.3], [0.2, 0.2], [0.1, 0.3]], [[7, 7]] * 3)
    assert found.mean == pytest.approx(0.2) and (found.low, found.high, found.p) == (-np.inf, np.inf, 1)
    # Other people for each seed, who have the same number, are several.
    assert np.isfinite(compare([[0.1], [0.2], [0.3]], [[0]] * 3, nested=True).low)


def test_with_one_seed_it_is_the_t_test_over_identities():
    differences = np.random.default_rng(0).normal(0.03, 0.2, 300)
    found = compare([differences], [range(300)])
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)
    assert found.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)


def test_the_queries_of_an_identity_are_drawn_together():
    """Ten copies of every query tell nothing more."""
    differences = np.random.default_rng(1).normal(0, 1, 200)
    once = compare([differences], [range(200)])
    repeated = compare([np.repeat(differences, 10)], [np.repeat(range(200), 10)])
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high), abs=0.01)


def test_an_identity_with_more_queries_counts_for_more():
    assert compare([[1.0, 0.0, 0.0, 0.0]], [[7, 3, 3, 3]], draws=10).mean == 0.25
    rng, counts = np.random.default_rng(2), np.repeat([1, 9], 20)
    identities = np.repeat(np.arange(40), counts)
    rows = rng.normal(1, 1, counts.sum())
    found = compare([rows], [identities])
    sums = np.bincount(identities, rows)
    drawn = rng.integers(40, size=(40_000, 40))
    wanted = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx(wanted, abs=0.01)


def test_the_effect_of_people_of_ones_own_is_not_counted_twice():
    rng = np.random.default_rng(3)
    rows = rng.normal(0, 3, (3, 60))
    rows += [[-0.2], [0.4], [1]] - rows.mean(1, keepdims=True)
    found = compare(rows, [range(60)] * 3, nested=True)
    people = np.stack([rng.choice(row, (40_000, 60)).mean(1) for row in rows])
    between = rows.mean(1).var(ddof=1) - people.var(1).mean()
    sums = np.tile(people.mean(0), 25) + (between / 3) ** 0.5 * stats.t.rvs(2, size=1_000_000, random_state=rng)
    assert (found.low, found.high) == pytest.approx(np.percentile(sums, [2.5, 97.5]), rel=0.03)


@pytest.mark.parametrize("nested", [False, True], ids=["same people", "other people for each seed"])
@pytest.mark.parametrize("between_seeds", [0.0, 3.0])
def test_about_19_of_20_intervals_hold_the_truth(nested, between_seeds):
    """The standard deviation between seeds is in units of that of a mean over the identities."""
    rng, number, trials, hits = np.random.default_rng(5), 25, 100, 0
    for trial in range(trials):
        people = rng.normal(0, number**0.5, (3 if nested else 1, number))
        rows = people + rng.normal(0, between_seeds, (3, 1)) + rng.normal(0, 1, (3, number))
        found = compare(rows, [range(number)] * 3, nested, draws=300, seed=trial)
        hits += found.low <= 0 <= found.high
    assert hits / trials >= 0.88


@pytest.mark.parametrize("count", [1, 4, 11])
def test_holm_equals_its_definition(count):
    p = np.random.default_rng(count).uniform(0, 0.2, count).tolist()
    expected = []
    for value in p:
        # The largest of (number of p-values that are not smaller) times p, over all p-values up to this one.
        expected.append(min(1, max(other * sum(third >= other for third in p) for other in p if other <= value)))
    assert holm(p) == pytest.approx(expected)
