"""DRSLoss with every distance of pytorch-metric-learning, and at the limits of precision."""

import contextlib
import functools
import itertools

import pytest
import reference
import torch
from batches import DEVICES, assert_agrees, expected, make_batch, make_loss
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance, SNRDistance

from pml_drsl.checks import InputError
from pml_drsl.distances import distance_matrix, prepare


def lp(p, power=1, normalize=True):
    def slow(x, y):
        if normalize:
            x, y = x / x.norm(p), y / y.norm(p)
        return (x - y).norm(p) ** power

    return LpDistance(p=p, power=power, normalize_embeddings=normalize), slow


class Doubled(CosineSimilarity):
    def compute_mat(self, query_emb, ref_emb):
        return 2 * super().compute_mat(query_emb, ref_emb)


# Of a p other than 2 the power is PML's alone.
OTHERS = {(1, 2, False), (1.5, 1, False), (3, 2, True), (float("inf"), 1, True)}
LP = {*OTHERS, *itertools.product((2,), (1, 2, 3), (True, False))}
DISTANCES = {
    **{f"L{p}, power {power}, {'normalised' if norm else 'raw'}": lp(p, power, norm) for p, power, norm in sorted(LP)},
    "cosine": (CosineSimilarity(), reference.negative_cosine),
    "cosine, power 2": (CosineSimilarity(power=2), lambda x, y: -(reference.negative_cosine(x, y) ** 2)),
    "doubled cosine": (Doubled(), lambda x, y: 2 * reference.negative_cosine(x, y)),
    "dot product": (DotProductSimilarity(normalize_embeddings=False), lambda x, y: -(x @ y)),
    "normalised dot product": (DotProductSimilarity(), reference.negative_cosine),
    "signal to noise": (
        SNRDistance(),
        lambda x, y: (x / x.norm() - y / y.norm()).var() / (x / x.norm()).var(),
    ),
    "raw signal to noise": (SNRDistance(normalize_embeddings=False), lambda x, y: (x - y).var() / x.var()),
}


@pytest.mark.parametrize("name", DISTANCES)
def test_agrees_with_the_definition(name):
    distance, slow = DISTANCES[name]
    x, labels = make_batch(3, size=10)
    for ref, ref_labels in ((None, None), make_batch(4, size=12)):
        wanted = expected(x, labels, ref, ref_labels, temperature=0.3, sort_weight=0.5, distance=slow)
        for fused in (True, False):
            loss = make_loss(0.3, 0.5, distance=distance, fused=fused)(x, labels, None, ref, ref_labels)
            assert_agrees(loss, [x] if ref is None else [x, ref], wanted, 1e-8)


def test_a_distance_keeps_its_own_statistics():
    distance, (x, labels) = CosineSimilarity(collect_stats=True), make_batch(3)
    make_loss(distance=distance)(x, labels)
    assert distance.initial_avg_query_norm == pytest.approx(x.norm(dim=1).mean().item())


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        (LpDistance(power=0.5), "power=0.5; below 1 the gradient"),
        (LpDistance(p=0.5), "p=0.5 .* below 1 the gradient"),
        (LpDistance(p=0), "p=0 .* below 1 the gradient"),
        (CosineSimilarity(power=0.5), "power=0.5, and that power of a negative similarity is not a number"),
    ],
)
def test_what_cannot_work_is_refused(distance, message):
    with pytest.raises(ValueError, match=message):
        make_loss(distance=distance)


def test_an_embedding_without_variance_has_no_signal_to_noise_ratio():
    x, labels = make_batch(3, size=10)
    with torch.no_grad():
        x[4] = 7
    with pytest.raises(ValueError, match="SNRDistance gave infinite or NaN values"):
        make_loss(distance=SNRDistance())(x, labels)


# Precision.

SOUND = [name for name in DISTANCES if "signal" not in name]  # an embedding without variance has no such ratio


@pytest.mark.parametrize("name", SOUND)
def test_gradients_are_finite_for_identical_zero_and_large_embeddings(name):
    directions = torch.nn.functional.normalize(torch.randn(32, 6, generator=torch.Generator().manual_seed(0)))
    values = torch.ones(32, 6), torch.zeros(32, 6), 1e4 * directions, 1e-4 * directions
    dtypes = torch.float64, torch.float32, torch.float16, torch.bfloat16
    for number, (value, dtype, fused) in enumerate(itertools.product(values, dtypes, (True, False))):
        bound_power = (None, 0.1)[(number // 2 + number // 8 + number) % 2]  # both for every value, type and path
        size = (8, 32)[(number // 2 + number // 8) % 2]  # torch.cdist takes another path above 25 rows
        x, labels = value[:size].to(dtype, copy=True), torch.arange(size) // 4
        x[: size // 2] *= 0.5
        x[3], x[5] = 0, x[4]
        x.requires_grad_()
        loss = make_loss(distance=DISTANCES[name][0], fused=fused, bound_power=bound_power)(x, labels)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_the_loss_of_a_diverged_network_is_not_finite(name):
    x, labels = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) // 4
    for rows, fused in itertools.product((slice(0, 1), slice(None)), (True, False)):
        x[rows] = torch.nan
        with contextlib.suppress(InputError):
            assert not make_loss(distance=DISTANCES[name][0], fused=fused)(x, labels).isfinite()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("distance", [LpDistance, functools.partial(LpDistance, power=2), DotProductSimilarity])
def test_short_embeddings_keep_their_angle(distance, fused):
    loss_fn = make_loss(0.1, 1.0, distance=distance(normalize_embeddings=False), fused=fused)
    x, labels = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32) // 4
    for rows in (slice(1), slice(None)):
        for scale in (1e-6, 1e-10, 1e-18, 1e-22):
            y = x.clone()
            y[rows] *= scale
            y.requires_grad_()
            loss = loss_fn(y, labels)
            loss.backward()
            if scale > 1e-12:
                torch.testing.assert_close(loss.double(), loss_fn(y.detach().double(), labels), rtol=1e-4, atol=1e-4)
            assert torch.isfinite(loss)
            assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize("distance", [LpDistance(), LpDistance(power=2), LpDistance(p=1), CosineSimilarity()])
def test_an_embedding_without_direction_is_orthogonal_to_all(distance):
    some, none = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    loss_fn = make_loss(distance=distance, collect_stats=True)
    for query, positive in ((some, none), (none, some), (none, none)):
        loss_fn(query, torch.tensor([0]), None, torch.cat([positive, torch.ones(1, 2)]), torch.tensor([0, 1]))
        assert loss_fn.sort_error == 0.5


@pytest.mark.parametrize("gpu", DEVICES[1:])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_agrees_with_the_cpu(dtype, gpu):
    x, labels = make_batch(2, size=64, dim=16, dtype=torch.float32)
    results = []
    for device in ("cpu", gpu):
        y = x.detach().to(dtype).to(device).requires_grad_()
        loss = make_loss(0.05)(y, labels.to(device))
        results.append((loss.cpu(), torch.autograd.grad(loss, y)[0].cpu()))
    torch.testing.assert_close(*results, rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("gpu", DEVICES[1:])
def test_autocast_on_a_gpu_is_left_out(gpu):
    x, labels = (t.to(gpu) for t in make_batch(2, size=24, dtype=torch.float32))
    with torch.autocast(gpu):
        loss = make_loss()(x, labels)
    torch.testing.assert_close(loss, make_loss()(x, labels), rtol=0, atol=0)


@pytest.mark.parametrize(
    "distance",
    [
        LpDistance(),
        LpDistance(normalize_embeddings=False),
        LpDistance(power=2),
        CosineSimilarity(),
        CosineSimilarity(power=2),
        DotProductSimilarity(normalize_embeddings=False),
    ],
)
def test_the_distance_matrix_is_that_of_pml(distance):
    for size, fused in itertools.product((1, 12, 40), (True, False)):  # torch.cdist takes another path above 25 rows
        x = torch.randn(size, 6, dtype=torch.float64)
        x[size // 2] = x[0]
        x.requires_grad_()
        # Between equal vectors a matrix product leaves the root of its rounding, and no direction.
        weight = torch.rand(size, size, dtype=torch.float64) * (torch.cdist(x, x) > 1e-6)
        for ref in (None, torch.randn(5, 6, dtype=torch.float64, requires_grad=True)):
            prepared = (None if y is None else prepare(distance, y, fused) for y in (x, ref))
            ours, pml = distance_matrix(distance, *prepared, fused), distance(x, ref)
            torch.testing.assert_close(-ours if distance.is_inverted else ours, pml, rtol=1e-12, atol=1e-7)
            weights = weight if ref is None else torch.rand(size, 5, dtype=torch.float64)
            inputs = [x] if ref is None else [x, ref]
            gradients = [torch.autograd.grad((weights * mat).sum(), inputs) for mat in (ours, pml)]
            if distance.is_inverted:
                gradients[0] = tuple(-gradient for gradient in gradients[0])
            torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("distance", [LpDistance(), CosineSimilarity()])
def test_the_given_gradient_is_not_changed_whatever_its_layout(distance):
    x = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(30, 30, dtype=torch.float64).fill_diagonal_(0)
    before = weight.clone()
    gradients = [torch.autograd.grad(distance_matrix(distance, x), x, w)[0] for w in (weight.T, weight.T.contiguous())]
    torch.testing.assert_close(*gradients)
    assert torch.equal(weight, before)
