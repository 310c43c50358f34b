"""Our miners against slow loops over what they promise, and PML's miners in front of DRSLoss."""

import inspect
import pickle

import pytest
import torch
from batches import make_batch, make_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.distances import BatchedDistance, CosineSimilarity, LpDistance
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from reference import pairs_from_labels

from pml_drsl.distributed import DistributedMinerWrapper
from pml_drsl.miners import NegativeBudgetMiner, RankViolationMiner

DISTANCES = {"euclidean": LpDistance(), "cosine": CosineSimilarity()}


def by_query(pairs, num_queries):
    return [sorted(c for q, c in pairs if q == query) for query in range(num_queries)]


def setup(seed, sizes, ref_sizes, distance):
    """A batch of unequal classes, and its distances, positives and negatives as plain Python."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)] - 2
    x = torch.randn(len(labels), 4, generator=generator, dtype=torch.float64)
    ref, ref_labels = None, None
    if ref_sizes is not None:
        ref_labels = torch.arange(len(ref_sizes)).repeat_interleave(torch.tensor(ref_sizes)) - 2
        ref = torch.randn(len(ref_labels), 4, generator=generator, dtype=torch.float64)
    d = distance(x, ref) * (-1 if distance.is_inverted else 1)
    pairs = pairs_from_labels(labels.tolist(), None if ref is None else ref_labels.tolist())
    positives, negatives = (by_query(side, len(labels)) for side in pairs)
    return (x, labels, ref, ref_labels), d.tolist(), positives, negatives


BATCHES = {
    "seed": st.integers(0, 1000),
    "sizes": st.lists(st.integers(1, 5), min_size=1, max_size=5),
    "ref_sizes": st.none() | st.lists(st.integers(1, 5), min_size=1, max_size=6),
    "distance": st.sampled_from(list(DISTANCES)),
}


@settings(max_examples=50, deadline=None)
@given(**BATCHES, margin=st.sampled_from([0.0, 0.3, -0.2]))
def test_rank_violations_are_those_of_a_slow_loop(seed, sizes, ref_sizes, distance, margin):
    batch, d, positives, negatives = setup(seed, sizes, ref_sizes, DISTANCES[distance])
    wanted_p, wanted_n = set(), set()
    for q, (P, N) in enumerate(zip(positives, negatives, strict=True)):
        for p in P:
            for n in N:
                if d[q][n] - d[q][p] < margin:
                    wanted_p.add((q, p))
                    wanted_n.add((q, n))
    a1, p, a2, n = RankViolationMiner(margin, distance=DISTANCES[distance])(*batch)
    assert sorted(zip(a1.tolist(), p.tolist(), strict=True)) == sorted(wanted_p)
    assert sorted(zip(a2.tolist(), n.tolist(), strict=True)) == sorted(wanted_n)


@settings(max_examples=50, deadline=None)
@given(**BATCHES, ratio=st.sampled_from([0.1, 0.5, 1, 2, 3.4, 1000]), strategy=st.sampled_from(["hard", "semihard"]))
def test_negative_budget_is_that_of_a_slow_loop(seed, sizes, ref_sizes, distance, ratio, strategy):
    batch, d, positives, negatives = setup(seed, sizes, ref_sizes, DISTANCES[distance])
    indices = NegativeBudgetMiner(ratio, strategy, distance=DISTANCES[distance])(*batch)
    chosen = by_query(set(zip(*(index.tolist() for index in indices[2:]), strict=True)), len(d))
    kept = by_query(set(zip(*(index.tolist() for index in indices[:2]), strict=True)), len(d))
    assert kept == positives
    assert len(indices[2]) == sum(map(len, chosen))  # no pair twice
    for q, (P, N) in enumerate(zip(positives, negatives, strict=True)):
        number = min(len(N), max(1, round(ratio * len(P)))) if P else 0
        order = sorted(N, key=lambda n: d[q][n])
        if strategy == "semihard" and P:
            nearest = min(d[q][p] for p in P)
            beyond = [n for n in order if d[q][n] > nearest]
            order = beyond + [n for n in reversed(order) if n not in beyond]
        assert chosen[q] == sorted(order[:number])


def test_a_negative_at_the_distance_of_a_positive_is_neither_ahead_nor_beyond():
    # Image 2 is as far from image 0 as the positive, and image 3 from image 1.
    x, labels = torch.tensor([[1.0, 0], [0, 1], [0, 1], [-1, 0]]), torch.tensor([0, 0, 1, 2])
    violations = RankViolationMiner(distance=CosineSimilarity())(x, labels)
    assert [index.tolist() for index in violations] == [[1], [0], [1], [2]]
    chosen = NegativeBudgetMiner(1, "semihard", distance=CosineSimilarity())(x, labels)
    assert [index.tolist() for index in chosen] == [[0, 1], [1, 0], [0, 1], [3, 3]]


def test_random_budgets_draw_every_negative_alike():
    x, labels = torch.randn(12, 3), torch.arange(12) // 3
    miner = NegativeBudgetMiner(1, "random", seed=0)
    counts = torch.zeros(12, 12)
    for _ in range(600):
        _, _, a2, n = miner(x, labels)
        assert (torch.bincount(a2) == 2).all()
        assert (labels[a2] != labels[n]).all()
        counts[a2, n] += 1
    # 600 draws of 2 of 9: 133 each, standard deviation 10
    assert ((counts[labels[:, None] != labels] - 133.3).abs() < 50).all()


def test_one_positive_and_many_negatives():
    labels = torch.randint(0, 20, (200,), generator=torch.Generator().manual_seed(0))
    a1, p, a2, n = NegativeBudgetMiner(25, "random", seed=1, positives=1)(torch.randn(200, 4), labels)
    assert torch.equal(a1.sort().values, torch.arange(200)) and torch.equal(a2.bincount(), torch.full((200,), 25))
    assert (labels[a1] == labels[p]).all() and (a1 != p).all() and (labels[a2] != labels[n]).all()
    with pytest.raises(ValueError, match="positives must be"):
        NegativeBudgetMiner(25, positives=0)


def test_random_budgets_repeat_by_seed():
    x, labels = make_batch(0)

    def draw(miner):
        return torch.stack(miner(x, labels)[2:]).tolist()

    first, second = NegativeBudgetMiner(1, "random", seed=5), NegativeBudgetMiner(1, "random", seed=5)
    state = torch.random.get_rng_state()
    assert draw(first) == draw(second)
    assert torch.equal(torch.random.get_rng_state(), state)
    copied = pickle.loads(pickle.dumps(first))
    third = draw(first)
    assert third == draw(copied)  # goes on where it was
    assert third != draw(NegativeBudgetMiner(1, "random", seed=5))
    torch.manual_seed(3)
    unseeded = draw(NegativeBudgetMiner(1, "random"))
    torch.manual_seed(3)
    assert draw(NegativeBudgetMiner(1, "random")) == unseeded


def draws(miner, number=4):
    x, labels = make_batch(0, size=24)
    return [torch.stack(miner(x, labels)[2:]).tolist() for _ in range(number)]


def test_a_restored_miner_goes_on_with_its_draws():
    miner = NegativeBudgetMiner(1, "random", seed=5)
    draws(miner, 2)
    restored = NegativeBudgetMiner(1, "random", seed=5)
    restored.load_state_dict(miner.state_dict())
    assert draws(miner) == draws(restored)


def test_seeds_have_streams_of_their_own():
    first, second = draws(NegativeBudgetMiner(1, "random", seed=0)), draws(NegativeBudgetMiner(1, "random", seed=1))
    assert not [draw for draw in first if draw in second]
    assert len({str(draw) for draw in first}) == len(first)


def test_two_views_may_share_their_labels():
    miner, (x, labels) = RankViolationMiner(0.5), make_batch(2)
    view = make_batch(3)[0].detach()
    shared, copied = miner(x, labels, view, labels), miner(x, labels, view, labels.clone())
    assert [index.tolist() for index in shared] == [index.tolist() for index in copied]
    itself = miner(x, labels, x, labels.clone())
    assert [index.tolist() for index in itself] == [index.tolist() for index in miner(x, labels)]


@pytest.mark.parametrize("miner", [RankViolationMiner(0.5), NegativeBudgetMiner(2), NegativeBudgetMiner(2, "semihard")])
def test_the_query_itself_among_the_references_is_no_candidate(miner):
    x, labels = make_batch(2)
    own = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    ref, ref_labels = torch.empty_like(x), torch.empty_like(labels)
    ref[own], ref_labels[own] = x.detach(), labels
    a1, p, a2, n = miner(x, labels)
    told = miner(x, labels, ref, ref_labels, own)
    for (anchor, other), (told_anchor, told_other) in (((a1, p), told[:2]), ((a2, n), told[2:])):
        pairs = set(zip(anchor.tolist(), own[other].tolist(), strict=True))
        assert pairs == set(zip(told_anchor.tolist(), told_other.tolist(), strict=True))


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("miner", [RankViolationMiner(), NegativeBudgetMiner(2, "semihard")])
def test_batches_of_0_and_1_give_no_pairs(miner, size):
    indices = miner(torch.randn(size, 3), torch.arange(size))
    assert [len(index) for index in indices] == [0] * 4
    assert make_loss()(torch.randn(size, 3), torch.arange(size), indices) == 0


def test_half_precision_is_ranked_in_float32():
    x, labels = make_batch(1, size=24, dtype=torch.float32)
    half = x.detach().half()
    for miner in (RankViolationMiner(), NegativeBudgetMiner(2)):
        for index, wanted in zip(miner(half, labels), miner(half.float(), labels), strict=True):
            assert torch.equal(index, wanted)


def test_stats_and_repr():
    x, labels = make_batch(1)
    miner = NegativeBudgetMiner(2, "hard", collect_stats=True)
    a1, _, a2, _ = miner(x, labels)
    assert (miner.num_pos_pairs, miner.num_neg_pairs) == (len(a1), len(a2))
    assert "negatives_per_positive=2.0, strategy='hard', seed=None, positives=None" in repr(miner)
    assert "margin=0.1" in repr(RankViolationMiner(0.1))


@pytest.mark.parametrize("budget", [1000, 1e20])
def test_a_large_budget_keeps_all_negatives(budget):
    x, labels = make_batch(1)
    kept = NegativeBudgetMiner(budget, positives=1)(x, labels)[2:]
    everything = lmu.get_all_pairs_indices(labels)[2:]
    assert set(zip(*map(torch.Tensor.tolist, kept), strict=True)) == {
        pair for pair in zip(*map(torch.Tensor.tolist, everything), strict=True) if pair[0] in set(kept[0].tolist())
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankViolationMiner(float("nan")), "margin must be a finite number, got nan"),
        (lambda: NegativeBudgetMiner(1, seed=0.5), "seed must be None or an integer of at least 0, got 0.5"),
        (lambda: NegativeBudgetMiner(1, seed=-1), "seed must be None or an integer of at least 0, got -1"),
        (lambda: NegativeBudgetMiner(1, sed=0), "NegativeBudgetMiner has no argument 'sed'; the nearest is 'seed'"),
        (lambda: RankViolationMiner(mragin=1), "RankViolationMiner has no argument 'mragin'; the nearest is 'margin'"),
        (lambda: NegativeBudgetMiner(0), "negatives_per_positive must be a number above 0, got 0"),
        (lambda: NegativeBudgetMiner(float("inf")), "negatives_per_positive .* got inf"),
        (lambda: RankViolationMiner(distance=BatchedDistance(LpDistance())), "give the distance inside it, LpDistance"),
        (lambda: NegativeBudgetMiner(1, "easy"), "strategy must be one of hard, semihard, random, got 'easy'"),
    ],
)
def test_bad_hyper_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_references_and_their_labels_go_together():
    with pytest.raises(ValueError, match="ref_emb without ref_labels"):
        RankViolationMiner()(torch.randn(4, 3), torch.arange(4), torch.randn(5, 3))
    for miner in (RankViolationMiner(), DistributedMinerWrapper(pml_miners.TripletMarginMiner())):
        with pytest.raises(ValueError, match="ref_labels without ref_emb"):
            miner(torch.randn(4, 3), torch.arange(4), None, torch.arange(4))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("strategy", ["hard", "semihard", "random"])
def test_an_embedding_that_is_not_finite_makes_the_loss_nan_as_without_a_miner(strategy, value):
    x, labels = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 4
    x[5, 1] = value
    a1, p, a2, n = indices = NegativeBudgetMiner(2, strategy, seed=0)(x, labels)
    assert (labels[a1] == labels[p]).all() and (a1 != p).all() and (labels[a2] != labels[n]).all()
    assert torch.equal(torch.bincount(a2), torch.full((12,), 6))
    assert make_loss()(x, labels).isnan() and make_loss()(x, labels, indices).isnan()


# PML's miners in front of DRSLoss.

MINERS = {
    "AngularMiner": lambda: pml_miners.AngularMiner(angle=20),
    "BatchEasyHardMiner": pml_miners.BatchEasyHardMiner,
    "BatchHardMiner": pml_miners.BatchHardMiner,
    "DistanceWeightedMiner": pml_miners.DistanceWeightedMiner,
    "EmbeddingsAlreadyPackagedAsTriplets": pml_miners.EmbeddingsAlreadyPackagedAsTriplets,
    "HDCMiner": lambda: pml_miners.HDCMiner(filter_percentage=0.5),
    "MultiSimilarityMiner": lambda: pml_miners.MultiSimilarityMiner(epsilon=0.2),
    "PairMarginMiner": lambda: pml_miners.PairMarginMiner(pos_margin=0.2, neg_margin=1.5),
    "TripletMarginMiner": lambda: pml_miners.TripletMarginMiner(margin=0.3),
    "UniformHistogramMiner": pml_miners.UniformHistogramMiner,
    "RankViolationMiner": RankViolationMiner,
    "NegativeBudgetMiner": lambda: NegativeBudgetMiner(1),
}


def test_all_of_pml_s_miners_are_tried():
    classes = {name for name, value in vars(pml_miners).items() if inspect.isclass(value)}
    assert classes - {"BaseMiner"} <= set(MINERS)


@pytest.mark.parametrize("name", MINERS)
def test_every_miner_works_in_front(name):
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    ref = torch.randn(30, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels, candidates = torch.arange(24) % 6, [(None, None), (ref, torch.arange(30) % 6)]
    if name == "EmbeddingsAlreadyPackagedAsTriplets":  # its triplets are of the batch itself
        labels, candidates = torch.tensor([0, 0, 1]).repeat(8), candidates[:1]
    for given_refs in candidates:
        torch.manual_seed(0)
        indices = MINERS[name]()(x, labels, *given_refs)
        assert len(indices[0]) > 0
        loss = make_loss(0.1)(x, labels, indices, *given_refs)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss > 0
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0
