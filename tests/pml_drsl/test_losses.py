"""DRSLoss against a slow loop over its definition, in the cases a user can make."""

import math
import shutil
import subprocess
import sys
from fractions import Fraction
from typing import get_type_hints

import numpy as np
import pytest
import reference
import torch
from batches import assert_agrees, expected, make_batch, make_loss, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import BaseDistance, BatchedDistance, CosineSimilarity, LpDistance
from pytorch_metric_learning.reducers import MeanReducer, MultipleReducers, SumReducer
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from sklearn.metrics import average_precision_score
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pml_drsl import losses


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(-3, 3), min_size=2, max_size=12),
    ref_labels=st.none() | st.lists(st.integers(-3, 3), min_size=1, max_size=15),
    temperature=st.sampled_from([0.02, 0.1, 1.0]),
    sort_weight=st.sampled_from([0.0, 0.5]),
    bound_power=st.sampled_from([None, 1, 0.1]),
    fused=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_agrees_for_any_labels_and_references(labels, ref_labels, temperature, sort_weight, bound_power, fused, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(labels)
    ref, inputs = None, [x]
    if ref_labels is not None:
        ref = torch.randn(len(ref_labels), 4, generator=generator, dtype=torch.float64, requires_grad=True)
        ref_labels, inputs = torch.tensor(ref_labels), [x, ref]
    settings = {"temperature": temperature, "sort_weight": sort_weight, "bound_power": bound_power}
    loss = make_loss(**settings, fused=fused)(x, labels, ref_emb=ref, ref_labels=ref_labels)
    pairs = reference.pairs_from_labels(labels.tolist(), None if ref is None else ref_labels.tolist())
    if reference.drsl(x, *pairs, ref, **settings).isnan():
        assert loss == 0
        loss.backward()
        assert (x.grad == 0).all()
    else:
        assert_agrees(loss, inputs, expected(x, labels, ref, ref_labels, **settings), 1e-9)


@pytest.mark.parametrize("form", ["pairs", "triplets"])
@pytest.mark.parametrize("with_ref", [False, True])
def test_agrees_for_the_pairs_of_a_miner(form, with_ref):
    x, labels = make_batch(5)
    ref, ref_labels = make_batch(6, size=20) if with_ref else (None, None)
    a1, p, a2, n = lmu.get_all_pairs_indices(labels, ref_labels)
    keep_p, keep_n = torch.arange(len(p)) % 3 > 0, torch.arange(len(n)) % 4 > 0
    keep_n &= a2 != a2[0]  # A query without a negative has no term.
    indices = a1[keep_p], p[keep_p], a2[keep_n], n[keep_n]
    if form == "triplets":
        indices = lmu.convert_to_triplets(indices, labels)
        anchors, positives, negatives = (index.tolist() for index in indices)
        pairs = set(zip(anchors, positives, strict=True)), set(zip(anchors, negatives, strict=True))
    else:
        pairs = tuple(set(zip(a.tolist(), b.tolist(), strict=True)) for a, b in (indices[:2], indices[2:]))
    duplicated = tuple(torch.cat([index, index[:7]]) for index in indices)
    wanted = expected(x, labels, ref, ref_labels, pairs, temperature=0.1, sort_weight=0.3)
    inputs = [x] if ref is None else [x, ref]
    # Triplets hold a pair several times in a row.
    for pairs_or_triplets, given_labels in ((duplicated, (labels, ref_labels)), (indices, (None, None))):
        loss = make_loss(0.1)(x, given_labels[0], pairs_or_triplets, ref, given_labels[1])
        assert_agrees(loss, inputs, wanted, 1e-9)


def test_a_bound_is_no_less_than_the_error_of_the_true_ranks():
    # Of one positive per query: several have ranks among themselves, which are smoothed without a bound.
    labels = torch.arange(12) // 2
    for seed in range(20):
        x, _ = make_batch(seed)
        true = make_loss(1e-9, sort_weight=0)(x[:12], labels)
        for temperature in (0.01, 0.1, 1.0):
            bounds = [make_loss(temperature, 0, bound_power=p)(x[:12], labels) for p in (1, 0.5, 0.1)]
            assert true <= bounds[0] <= bounds[1] <= bounds[2]


def test_a_bound_pulls_at_a_positive_far_behind_its_negatives_where_the_error_does_not():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2])
    slopes = [torch.autograd.grad(make_loss(0.01, 0, bound_power=p)(x, labels), x)[0][1].norm() for p in (None, 1)]
    assert slopes[0] < 0.01 and slopes[1] > 0.1


def test_a_bound_of_a_small_power_still_moves_pairs_in_order():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    slopes = [
        torch.autograd.grad(make_loss(0.05, 0, bound_power=p, distance=CosineSimilarity())(x, labels), x)[0]
        for p in (1, 0.1)
    ]
    assert slopes[0].norm() < 1e-4 and slopes[1].norm() > 0.1


def test_the_least_loss_of_a_small_power_is_what_the_documentation_says():
    x, labels = torch.eye(16).repeat_interleave(4, 0), torch.arange(64) // 4
    values = [losses.DRSLoss(0.1, 0, bound_power=p)(x, labels).item() for p in (1, 0.1)]
    # 60 negatives at a right angle, and two other positives that are level with each.
    odds = 60 * math.log2(1 + math.exp(-1 / 0.1)) / (1 + 2 / 2)
    assert values == pytest.approx([math.log(1 + odds), math.log(1 + odds**0.1) / 0.1], rel=1e-4)
    assert [f"{value:.1g}" for value in values] == ["0.002", "4"] and round(values[1], 1) == 4.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bound_of_a_small_power_is_finite_where_a_count_is_0(dtype):
    x = torch.eye(4, dtype=dtype).repeat_interleave(2, 0).requires_grad_()
    for power in (1e-3, 0.1, 0.5):
        # The negatives are 10,000 temperatures behind.
        loss = make_loss(1e-4, 0, bound_power=power)(x, torch.arange(8) // 2)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and gradient.isfinite().all()


# Facts 1 to 6 of the definition; the seventh is in test_distances.py.


def test_fact_1_at_temperature_0_it_is_mean_average_precision():
    x, labels = make_batch(1, size=40)
    loss = make_loss(temperature=1e-9, sort_weight=0)(x, labels)
    precisions = []
    for q in range(len(x)):
        others = torch.arange(len(x)) != q
        truth = (labels[others] == labels[q]).numpy()
        if truth.any() and not truth.all():
            scores = torch.nn.functional.cosine_similarity(x[q], x[others]).detach().numpy()
            precisions.append(average_precision_score(truth, scores))
    assert 1 - loss.item() == pytest.approx(sum(precisions) / len(precisions), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_fact_2_smooth_ap_is_a_special_case(temperature):
    x = torch.randn(12, 6, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 0, 1, 2] * 3)
    loss_fn = make_loss(temperature, sort_weight=0, distance=CosineSimilarity())
    loss = loss_fn(x, labels, ref_emb=x.clone(), ref_labels=labels.clone())
    wanted = reference.smooth_ap(x, labels.tolist(), temperature)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (loss, wanted)), rtol=0, atol=1e-7)


def test_fact_3_queries_without_a_positive_or_a_negative_have_no_term():
    x, labels = make_batch(2, size=10)
    lonely = torch.cat([x, torch.randn(3, 5, dtype=torch.float64)])
    refs, ref_labels = x.detach().clone(), labels.clone()
    loss_fn = make_loss(0.1)
    only = loss_fn(x, labels, ref_emb=refs, ref_labels=ref_labels)
    more = loss_fn(lonely, torch.cat([labels, torch.tensor([50, 51, 52])]), ref_emb=refs, ref_labels=ref_labels)
    torch.testing.assert_close(only, more)


def test_fact_4_order_and_label_values_do_not_matter():
    x, labels = make_batch(3, size=20)
    loss_fn = make_loss(0.05)
    loss = loss_fn(x, labels)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    renamed = labels * -1000 + 17
    again = loss_fn(x[order], renamed[order])
    torch.testing.assert_close(loss, again, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(again, x)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("chunk", "form", "bound_power", "fused"),
    pairwise([1, 7, 100], ["labels", "indices", "ref"], [None, 0.5], [True, False]),
)
def test_fact_5_chunking_changes_nothing(chunk, form, bound_power, fused, monkeypatch):
    x, labels = make_batch(4, size=30)
    ref, ref_labels = make_batch(5, size=41) if form == "ref" else (None, None)
    indices = lmu.get_all_pairs_indices(labels) if form == "indices" else None
    whole = make_loss(0.05, bound_power=bound_power)(x, labels, indices, ref, ref_labels)
    monkeypatch.setattr("pml_drsl.fused.CPU_BLOCK", 50)
    monkeypatch.setattr("pml_drsl.functional.BLOCK", 50)
    loss_fn = make_loss(0.05, query_chunk_size=chunk, bound_power=bound_power, fused=fused)
    parts = loss_fn(x, labels, indices, ref, ref_labels)
    # A chunk that is computed again has the settings of its own call.
    loss_fn.temperature, loss_fn.margin, loss_fn.sort_weight, loss_fn.bound_power, loss_fn.fused = 1, 1, 0, 1, not fused
    loss_fn.collect_stats = False
    inputs = [x] if ref is None else [x, ref]
    gradients = torch.autograd.grad(parts, inputs)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(whole, inputs), gradients, rtol=1e-9, atol=1e-12)
    # Chunks that were not asked for are not computed again.
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk * len(inputs[-1]))
    once = make_loss(0.05, bound_power=bound_power, fused=fused)(x, labels, indices, ref, ref_labels)
    assert torch.equal(once, parts) and all(map(torch.equal, torch.autograd.grad(once, inputs), gradients))


def test_fact_5_a_chunk_that_is_computed_again_draws_the_same_random_numbers(monkeypatch):
    class Noisy(LpDistance):
        def forward(self, query_emb, ref_emb=None):
            return super().forward(query_emb, ref_emb) * torch.rand(len(query_emb), len(ref_emb))

    x, labels = make_batch(4)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 5 * len(x))
    gradients = []
    for chunk in (None, 5):
        torch.manual_seed(0)
        loss = make_loss(0.1, distance=Noisy(), query_chunk_size=chunk)(x, labels)
        gradients += torch.autograd.grad(loss, x)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("fused", [True, False])
def test_fact_5_a_chunk_is_not_computed_again_from_references_that_have_changed(fused):
    x, labels = make_batch(4)
    queue = torch.randn_like(x)
    distance = LpDistance(normalize_embeddings=False)
    loss = make_loss(distance=distance, fused=fused, query_chunk_size=5)(x, labels, None, queue, labels)
    queue[:3] = 0  # what a queue of embeddings does before the backward pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fact_5_the_default_chunk_size_bounds_the_distance_matrix(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 180)
    rows = []

    class Watched(LpDistance):
        def forward(self, query_emb, ref_emb=None):
            rows.append(len(query_emb))
            return super().forward(query_emb, ref_emb)

    x, labels = make_batch(4, size=30)
    make_loss(distance=Watched())(x, labels)
    assert max(rows) == 6


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("distance", [CosineSimilarity(), LpDistance(), LpDistance(normalize_embeddings=False)])
def test_fact_5_small_chunks_keep_no_copies_of_the_references(distance, fused, monkeypatch):
    x, labels = torch.randn(64, 256, requires_grad=True), torch.arange(64) // 4
    kept = []
    for elements in (2**24, 4 * 64):
        saved = []
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", elements)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            losses.DRSLoss(distance=distance, fused=fused)(x, labels)
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in saved}
        kept.append(sum(storages.values()))
    assert kept[1] < kept[0] + 64 * 256 * 4  # One copy of the references, and there are 16 chunks.


class Memory(TorchDispatchMode):
    """The bytes of the tensors made inside that live at one time, at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for storage in [part.untyped_storage() for part in tree_leaves(result) if torch.is_tensor(part)]:
            self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize(
    ("distance", "fused"), [(CosineSimilarity(), True), (LpDistance(), True), (LpDistance(), False)]
)
def test_fact_5_memory_grows_with_the_chunk_and_not_with_the_queries(distance, fused):
    most = []
    for chunk in (None, 8, 2):
        x, ref = torch.randn(32, 4, requires_grad=True), torch.randn(512, 4, requires_grad=True)
        loss_fn = losses.DRSLoss(distance=distance, query_chunk_size=chunk, fused=fused, collect_stats=True)
        with Memory() as memory:
            loss_fn(x, torch.arange(32), None, ref, torch.arange(512) // 4).backward()
        most.append(memory.most)
    assert most[2] < most[1] < most[0] / 2


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_fact_5_torch_compile_changes_nothing():
    network, labels = torch.nn.Linear(5, 3), torch.arange(12) // 3
    x, loss_fn = torch.randn(12, 5), make_loss(0.1)
    wanted = torch.autograd.grad(loss_fn(network(x), labels), network.weight)
    compiled = torch.compile(lambda x: loss_fn(network(x), labels))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), network.weight), wanted, rtol=1e-4, atol=1e-5)


def test_fact_6_gradcheck_and_float64():
    x, labels = make_batch(6, size=9, dim=3)
    loss_fn = make_loss(0.3, 0.5, 0.1)
    assert loss_fn(x, labels).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda e: loss_fn(e, labels), x)
    ref = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    ref_labels = torch.arange(11) % 3
    assert torch.autograd.gradcheck(lambda e, r: loss_fn(e, labels, ref_emb=r, ref_labels=ref_labels), (x, ref))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fact_6_half_precision_is_computed_in_float32(dtype):
    x, labels = make_batch(7, size=24, dtype=torch.float32)
    half = x.detach().to(dtype).requires_grad_()
    loss = make_loss()(half, labels)
    assert loss.dtype == torch.float32
    full = half.detach().float().requires_grad_()
    wanted = make_loss()(full, labels)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(half.grad, full.grad.to(dtype))


@pytest.mark.parametrize(("bound_power", "chunk"), [(None, None), (0.5, None), (0.5, 3)])
def test_a_second_backward_pass_gives_the_same_gradient(bound_power, chunk):
    x, labels = make_batch(2)
    loss = make_loss(0.1, bound_power=bound_power, query_chunk_size=chunk)(x, labels)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_two_views_may_share_their_labels():
    x, labels = make_batch(2)
    view = make_batch(3)[0]
    loss_fn = make_loss(0.1)
    loss = loss_fn(x, labels, ref_emb=view, ref_labels=labels)
    assert_agrees(loss, [x, view], expected(x, labels, view, labels, temperature=0.1, sort_weight=0.3), 1e-9)
    assert torch.equal(loss, loss_fn(x, labels, ref_emb=view, ref_labels=labels.clone()))


@pytest.mark.parametrize(("dtype", "chunk"), [(torch.float64, None), (torch.float16, 3)])
def test_references_that_are_the_embeddings_are_the_batch_itself(dtype, chunk):
    x, labels = make_batch(2, dtype=dtype)
    loss_fn = make_loss(0.1, query_chunk_size=chunk)
    assert torch.equal(loss_fn(x, labels, ref_emb=x, ref_labels=labels.clone()), loss_fn(x, labels))


# What PML's users rely on.


def test_sub_losses_can_be_reduced_apart():
    x, labels = make_batch(9)
    query, positive = lmu.get_all_pairs_indices(labels)[:2]
    loss_fn = make_loss(
        0.1, 0.4, reducer=MultipleReducers({"retrieval_loss": SumReducer(), "sort_loss": MeanReducer()})
    )
    assert loss_fn.sub_loss_names() == ["retrieval_loss", "sort_loss"]
    errors = loss_fn.compute_loss(x, labels, None, x, labels)
    assert list(errors) == loss_fn.sub_loss_names()
    for error in errors.values():
        assert error["reduction_type"] == "pos_pair"
        torch.testing.assert_close(torch.stack(error["indices"]), torch.stack([query, positive]))
    wanted = errors["retrieval_loss"]["losses"].sum() + errors["sort_loss"]["losses"].mean()
    torch.testing.assert_close(loss_fn(x, labels), wanted)


@pytest.mark.parametrize(("bound_power", "chunk"), [(None, 3), (0.1, None), (0.1, 3)])
def test_collect_stats_shows_each_error_of_the_definition(bound_power, chunk):
    x, labels = make_batch(10)
    loss_fn = make_loss(0.1, 0, bound_power=bound_power, query_chunk_size=chunk, collect_stats=True)
    loss_fn.sort_weight = 0.5  # as a schedule may assign it
    loss_fn(x, labels).backward()
    pairs = reference.pairs_from_labels(labels.tolist(), None)
    retrieval, both = (reference.drsl(x, *pairs, temperature=0.1, sort_weight=weight).item() for weight in (0, 0.5))
    assert float(loss_fn.retrieval_error) == pytest.approx(retrieval)
    assert float(loss_fn.sort_error) == pytest.approx((both - retrieval) / 0.5)
    assert not (loss_fn.retrieval_error.requires_grad or loss_fn.sort_error.requires_grad)
    has_positive = [(labels == label).sum() > 1 for label in labels]
    assert loss_fn.num_queries == sum(has_positive)
    loss_fn(x[:1], labels[:1])
    assert (loss_fn.retrieval_error, loss_fn.sort_error, loss_fn.num_queries) == (0, 0, 0)
    loss_fn.sort_weight = 0
    loss_fn(x, labels)
    assert loss_fn.sort_error == 0 < loss_fn.retrieval_error


def test_numbers_of_numpy_are_hyper_parameters():
    given = {"temperature": np.float32(0.25), "sort_weight": np.int64(1), "margin": np.float64(0.5)}
    loss_fn = make_loss(**given, bound_power=np.float32(0.5), query_chunk_size=np.int64(3))
    x, labels = make_batch(1)
    wanted = make_loss(0.25, 1, 0.5, bound_power=0.5, query_chunk_size=3)
    assert loss_fn.extra_repr() == wanted.extra_repr() == "temperature=0.25, sort_weight=1, margin=0.5, bound_power=0.5"
    assert wanted.extra_repr() in repr(wanted)
    assert torch.equal(loss_fn(x, labels), wanted(x, labels))


@pytest.mark.parametrize("bound_power", [None, 0.1])
@pytest.mark.parametrize("name", ["temperature", "margin"])
def test_a_learnable_temperature_or_margin_gets_its_gradient_and_needs_the_plain_path(name, bound_power):
    x, labels = make_batch(1)
    loss_fn = make_loss(0.1, 0.5, bound_power=bound_power, fused=False)
    values = [
        make_loss(**{"temperature": 0.1, "sort_weight": 0.5, name: 0.1 + step}, bound_power=bound_power)(x, labels)
        for step in (1e-6, -1e-6)
    ]
    learnable = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    assert get_type_hints(losses.DRSLoss.__init__)[name] == float | torch.Tensor
    setattr(loss_fn, name, learnable)
    (gradient,) = torch.autograd.grad(loss_fn(x, labels), learnable)
    assert gradient.item() == pytest.approx((values[0] - values[1]).item() / 2e-6, rel=1e-6)
    # Numbers and tensors of every kind have one value.
    expected = make_loss(**{"temperature": 0.1, "sort_weight": 0.5, name: 0.1}, bound_power=bound_power)(x, labels)
    for value in (Fraction(1, 10), np.float64(0.1), torch.full((1,), 0.1, dtype=torch.float64)):
        values = {"temperature": 0.1, "sort_weight": Fraction(1, 2), name: value}
        torch.testing.assert_close(make_loss(**values, bound_power=bound_power)(x, labels), expected)
    loss_fn.fused = True
    with pytest.raises(ValueError, match=f"a learnable {name} needs fused=False"):
        loss_fn(x, labels)


def test_labels_may_be_of_any_integer_type():
    x, labels = make_batch(13)
    wanted = make_loss()(x, labels)
    for dtype in (torch.int8, torch.int32):
        assert torch.equal(make_loss()(x, labels.to(dtype)), wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "temperature must be a number above 0, got 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "0.1"}, "temperature"),
        ({"sort_weight": -1}, "sort_weight must be a number of at least 0, got -1"),
        ({"bound_power": 0}, "bound_power must be None, or a number above 0 and at most 1, got 0"),
        ({"bound_power": 1.5}, "bound_power must be None, or a number above 0 and at most 1, got 1.5"),
        ({"bound_power": "None"}, "bound_power must be .* got 'None'"),
        ({"bound_power": True}, "bound_power must be .* got True"),
        ({"bound": True}, "DRSLoss has no argument 'bound'; the nearest is 'bound_power'"),
        ({"temprature": 0.1}, "DRSLoss has no argument 'temprature'; the nearest is 'temperature'"),
        ({"fused": "False"}, "fused must be True or False, got 'False'"),
        ({"margin": float("inf")}, "margin must be a finite number, got inf"),
        ({"query_chunk_size": 0}, "query_chunk_size"),
        ({"distance": "euclid"}, "distance must be a distance of pytorch_metric_learning.distances.*'euclid'"),
        ({"distance": BatchedDistance(LpDistance())}, r"returns none; give the distance inside it, LpDistance\(\)"),
    ],
)
def test_bad_hyper_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_loss(**arguments)
    ((name, value),) = arguments.items()
    loss_fn = make_loss()
    if hasattr(loss_fn, name) and value != "euclid":  # It is assigned later; torch itself refuses no module.
        setattr(loss_fn, name, value)
        with pytest.raises(ValueError, match=message):
            loss_fn(X, LABELS)


X, LABELS = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
INDEX = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(4), LABELS), r"embeddings must be .* of shape \(batch, dim\), got torch.float32 of shape \(4,\)"),
        ((X.long(), LABELS), "embeddings must be a floating-point tensor"),
        (([[1.0]], LABELS), "embeddings .* got list"),
        ((X, LABELS[:3]), r"labels must be an integer tensor of shape \(4,\), .*got torch.int64 of shape \(3,\)"),
        ((X, LABELS[:, None]), "labels must be an integer tensor"),
        ((X, LABELS.float()), "labels must be an integer tensor .* got torch.float32"),
        ((X, [0, 0, 1, 1]), "labels must be an integer tensor .* got list"),
        ((X,), "labels .* are required"),
        ((X, LABELS, None, X.clone()), r"ref_labels.* are required"),
        ((X, LABELS, None, None, LABELS), "ref_labels without ref_emb: give the references, or leave both out"),
        ((X, LABELS, None, torch.randn(5, 2), torch.arange(5)), "ref_emb has 2 dimensions and embeddings 3"),
        ((X, LABELS, None, torch.randn(5, 3), LABELS), r"ref_labels must be an integer tensor of shape \(5,\)"),
        ((X, LABELS, (INDEX, INDEX)), "indices_tuple must have 3 tensors .* or 4 .*got 2"),
        ((X, None, (INDEX, INDEX[:1], INDEX, INDEX)), "1-D anchors and positives of one length"),
        ((X, None, (INDEX, INDEX + 3, INDEX, INDEX + 2)), "positive indices from 3 to 4, outside the 4 embeddings"),
        ((X, None, (INDEX - 1, INDEX, INDEX, INDEX)), "anchor indices from -1 to 0"),
        ((X, LABELS, None, X, LABELS + 1), "ref_emb is the object embeddings, and ref_labels differ from labels"),
        ((X, None, (INDEX, INDEX + 1, INDEX, INDEX + 1)), r"pair \(0, 1\) both as a positive and as a negative"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_loss()(*arguments)


def test_a_distance_of_ones_own_works():
    class Canberra(BaseDistance):
        def compute_mat(self, query_emb, ref_emb):
            difference = (query_emb[:, None] - ref_emb[None]).abs()
            return (difference / (query_emb[:, None].abs() + ref_emb[None].abs())).sum(2)

    def slow(x, y):
        x, y = x / x.norm(), y / y.norm()
        return ((x - y).abs() / (x.abs() + y.abs())).sum()

    x, labels = make_batch(14)
    loss = make_loss(0.1, distance=Canberra())(x, labels)
    assert_agrees(loss, [x], expected(x, labels, temperature=0.1, sort_weight=0.3, distance=slow), 1e-9)


def test_the_package_is_imported_without_torch_and_its_names_without_torchreid_and_faiss():
    program = """
import sys, pml_drsl, pml_drsl.checks
assert not {"torch", "numpy", "pytorch_metric_learning"} & set(sys.modules)
assert pml_drsl.__version__ and "DRSLoss" in dir(pml_drsl)
for name in ("faiss", "torchreid", "torchreid_ext", "cv2", "yacs"):
    sys.modules[name] = None  # an import of it raises
names = [getattr(pml_drsl, name) for name in pml_drsl.__all__]
assert pml_drsl.losses.DRSLoss in names and not hasattr(pml_drsl, "nothing")
import torch, pml_drsl.wrappers
from pml_drsl.evaluation.calculator import ReIDAccuracyCalculator
x = torch.eye(4)
assert ReIDAccuracyCalculator().get_accuracy(x[:2], torch.arange(2), x, torch.arange(4))["mAP"] == 1
sys.path = []  # without the metadata of the distribution
assert pml_drsl.__version__ == "unknown"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
