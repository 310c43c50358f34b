"""The errors by plain autograd and by the fused count, against the slow loop over the definition."""

import pytest
import reference
import torch
from batches import assert_agrees, expected, make_batch, make_loss, pairwise
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from torch.utils._python_dispatch import TorchDispatchMode

from pml_drsl import functional, fused
from pml_drsl.checks import InputError
from pml_drsl.distances import distance_matrix

DISTANCES = {
    "euclidean": (LpDistance(), reference.euclidean),
    "raw": (LpDistance(normalize_embeddings=False), reference.raw_euclidean),
    "cosine": (CosineSimilarity(), reference.negative_cosine),
    "dot product": (DotProductSimilarity(normalize_embeddings=False), lambda x, y: -(x @ y)),
}
# How many comparisons are made at once: all, or those of a query or two.
BLOCKS = [2**20, 40]
PATHS = {"plain": False, "fused": True}


@pytest.mark.parametrize(
    ("temperature", "bound_power", "name", "with_ref", "margin_and_sort", "block"),
    pairwise([0.01, 0.1], [None, 1, 0.1], list(DISTANCES), [False, True], [(0, 0.7), (0.1, 0)], BLOCKS),
)
def test_both_paths_agree_with_the_slow_loop(
    temperature, bound_power, name, with_ref, margin_and_sort, block, monkeypatch
):
    monkeypatch.setattr(functional, "BLOCK", block)
    monkeypatch.setattr(fused, "CPU_BLOCK", block)
    (margin, sort_weight), (distance, slow) = margin_and_sort, DISTANCES[name]
    settings = {"temperature": temperature, "sort_weight": sort_weight, "margin": margin, "bound_power": bound_power}
    wanted = None
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        x, labels = make_batch(3, size=10, dtype=dtype)
        ref, ref_labels = make_batch(4, size=12, dtype=dtype) if with_ref else (None, None)
        wanted = wanted or expected(x, labels, ref, ref_labels, **settings, distance=slow)
        for is_fused in PATHS.values():
            loss = make_loss(**settings, distance=distance, fused=is_fused)(x, labels, None, ref, ref_labels)
            assert loss.dtype == dtype
            assert_agrees(loss, [x, ref] if with_ref else [x], wanted, tolerance)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("temperature", [0.005, 0.05])
@pytest.mark.parametrize("path", PATHS)
def test_a_small_power_keeps_its_gradient_at_small_temperatures(path, temperature, block, monkeypatch):
    monkeypatch.setattr(functional, "BLOCK", block)
    monkeypatch.setattr(fused, "CPU_BLOCK", block)
    # Every identity is at a right angle to all others: negatives are 1 / temperature behind, and their count is as
    # small as exp(-1 / temperature), which float32 cannot hold from a temperature of 0.01 on.
    x = (torch.eye(4) + 0.1 * torch.linspace(-1, 1, 16).sin().reshape(4, 4)).repeat_interleave(2, 0)
    x = (x + 0.05 * torch.linspace(0, 9, 32).cos().reshape(8, 4)).double().requires_grad_()
    labels = torch.arange(8) // 2
    settings = {"temperature": temperature, "sort_weight": 0, "bound_power": 0.1}
    value, (gradient,) = expected(x, labels, distance=reference.negative_cosine, **settings)
    assert gradient.norm() > 0.1 * value
    y = x.detach().float().requires_grad_()
    loss = make_loss(**settings, distance=CosineSimilarity(), fused=PATHS[path])(y, labels)
    torch.testing.assert_close(loss.double(), value, rtol=1e-4, atol=0)
    found = torch.autograd.grad(loss, y)[0].double()
    torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max())


def lists_in_transforms():
    """Whether this torch can read a tensor inside a transform of torch.func; torch 2.6 cannot."""
    try:
        torch.func.grad(lambda x: x.sum() * (x > 0).tolist()[0])(torch.ones(2))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "bound_power", "block", "chunk"), pairwise(["euclidean", "raw", "cosine"], [None, 0.5], BLOCKS, [None, 3])
)
def test_the_plain_path_can_be_differentiated_twice_and_by_torch_func(name, bound_power, block, chunk, monkeypatch):
    monkeypatch.setattr(functional, "BLOCK", block)
    x, labels = make_batch(1, size=7, dim=3)
    options = {"distance": DISTANCES[name][0], "query_chunk_size": chunk, "fused": False}
    loss_fn = make_loss(0.3, 0.5, bound_power=bound_power, **options)

    def value(embeddings):
        return loss_fn(embeddings, labels)

    assert torch.autograd.gradgradcheck(value, x)
    if not lists_in_transforms():
        return
    y = x.detach()
    torch.testing.assert_close(torch.func.grad(value)(y), torch.autograd.grad(value(x), x)[0])
    if block > 40:
        torch.testing.assert_close(torch.func.hessian(value)(y), torch.autograd.functional.hessian(value, y))


@pytest.mark.parametrize("distance", [LpDistance(), CosineSimilarity(), LpDistance(p=1)])
def test_the_fused_path_refuses_a_second_derivative(distance):
    x, labels = make_batch(1)
    with pytest.raises(InputError, match=r"differentiated once: .* give fused=False"):
        torch.autograd.functional.hessian(lambda e: make_loss(0.1, distance=distance)(e, labels), x)
    with pytest.raises(InputError, match=r"torch\.func needs fused=False"):
        torch.func.grad(lambda e: make_loss(0.1, distance=distance)(e, labels))(x)
    if distance.p == 2:
        with pytest.raises(InputError, match=r"differentiated once: .* give fused=False"):
            torch.autograd.grad(distance_matrix(distance, x).sum(), x, create_graph=True)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [part.numel() for part in (result if isinstance(result, tuple) else [result]) if torch.is_tensor(part)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_larger_than_the_distances_or_a_block(path, monkeypatch):
    monkeypatch.setattr(functional, "BLOCK", 2**12)
    monkeypatch.setattr(fused, "CPU_BLOCK", 2**12)
    # 64 x 15 x 64 comparisons of negatives, and 64 x 15 x 15 of positives.
    x, labels = torch.randn(64, 8, requires_grad=True), torch.arange(64) // 16
    saved = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        make_loss(0.1, bound_power=0.5, fused=PATHS[path])(x, labels).backward()
    assert largest.elements <= 2**12
    kept = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in saved}
    assert sum(kept.values()) < 15 * 64 * 64 * 4


@pytest.mark.parametrize("path", PATHS)
def test_classes_of_very_different_sizes_and_blocks_without_a_pair(path, monkeypatch):
    monkeypatch.setattr(functional, "BLOCK", 60)
    monkeypatch.setattr(fused, "CPU_BLOCK", 60)
    x = torch.randn(15, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([7, 8, 9, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5])
    settings = {"temperature": 0.1, "sort_weight": 0.5, "bound_power": 0.3}
    loss = make_loss(**settings, query_chunk_size=4, fused=PATHS[path])(x, labels)
    assert_agrees(loss, [x], expected(x, labels, **settings), 1e-9)
