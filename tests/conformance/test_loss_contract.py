"""What every loss of pytorch-metric-learning keeps to, from its documentation and behaviour.

DRSLoss is held to it; one of PML's own losses is too, as a control of the contract itself.
"""

import copy
import pickle

import pytest
import torch
from batches import DEVICES, pairwise
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer, SumReducer, ThresholdReducer
from pytorch_metric_learning.regularizers import LpRegularizer
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_drsl.losses import DRSLoss
from pml_drsl.reducers import PerIdentityReducer, PerQueryReducer

LOSSES = [DRSLoss, ContrastiveLoss]
DISTANCES = {
    "default": lambda: None,
    "raw": lambda: LpDistance(normalize_embeddings=False),
    "squared": lambda: LpDistance(power=2),
    "cosine": CosineSimilarity,
}
DTYPES = {
    DRSLoss: [torch.float64, torch.float32, torch.float16, torch.bfloat16],
    ContrastiveLoss: [torch.float32],  # on the CPU PML has no distances of half precision
}
of_losses = pytest.mark.parametrize("loss_class", LOSSES, ids=lambda loss_class: loss_class.__name__)
on_devices = pytest.mark.parametrize("device", DEVICES)


def make(seed=0, size=15, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator).to(device=device, dtype=dtype)
    labels = torch.randint(0, 5, (size,), generator=generator)
    return x.requires_grad_(), labels.to(device)


def assert_sound(loss, *inputs):
    assert loss.ndim == 0
    assert torch.isfinite(loss)
    for x, gradient in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (x.shape, x.dtype, x.device)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0


@on_devices
@pytest.mark.parametrize(
    ("loss_and_dtype", "with_ref", "form", "distance"),
    pairwise(
        [(loss_class, dtype) for loss_class in LOSSES for dtype in DTYPES[loss_class]],
        [False, True],
        ["labels", "pairs", "triplets", "pairs alone"],
        list(DISTANCES),
    ),
    ids=str,
)
def test_gives_a_scalar_and_gradients(loss_and_dtype, with_ref, form, distance, device):
    loss_class, dtype = loss_and_dtype
    x, labels = make(device=device, dtype=dtype)
    ref, ref_labels = make(1, 21, device=device, dtype=dtype) if with_ref else (None, None)
    indices = {
        "labels": lambda: None,
        "pairs": lambda: lmu.get_all_pairs_indices(labels, ref_labels),
        "triplets": lambda: lmu.get_all_triplets_indices(labels, ref_labels),
        "pairs alone": lambda: lmu.get_all_pairs_indices(labels, ref_labels),
    }[form]()
    loss_fn = loss_class(distance=DISTANCES[distance]())
    by_labels = loss_fn(x, labels, ref_emb=ref, ref_labels=ref_labels)
    if form == "pairs alone":
        labels, ref_labels = None, None
    loss = loss_fn(x, labels, indices, ref, ref_labels)
    assert_sound(loss, *([x] if ref is None else [x, ref]))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    # all the pairs there are; a triplet repeats its pairs, which ContrastiveLoss counts
    if form != "triplets" or loss_class is DRSLoss:
        torch.testing.assert_close(loss, by_labels)


@pytest.mark.parametrize(
    ("loss_class", "reducer", "collect_stats", "regularized", "with_ref"),
    pairwise(
        LOSSES,
        [MeanReducer, SumReducer, AvgNonZeroReducer, lambda: ThresholdReducer(low=0.01), PerQueryReducer],
        *[[False, True]] * 3,
    ),
)
def test_takes_reducers_regularizers_and_stats(loss_class, reducer, collect_stats, regularized, with_ref):
    x, labels = make()
    ref, ref_labels = make(1, 21) if with_ref else (None, None)
    options = {"embedding_regularizer": LpRegularizer(), "embedding_reg_weight": 0.5} if regularized else {}
    plain = loss_class(reducer=reducer())(x, labels, None, ref, ref_labels)
    loss_fn = loss_class(reducer=reducer(), collect_stats=collect_stats, **options)
    loss = loss_fn(x, labels, None, ref, ref_labels)
    assert_sound(loss, x)
    # a threshold sees the regularizer's value too, so it is compared where none is
    if not regularized:
        torch.testing.assert_close(loss, plain)
    elif reducer in (MeanReducer, SumReducer, PerQueryReducer):
        torch.testing.assert_close(loss, plain + 0.5 * x.norm(dim=1).mean())
    for name in getattr(loss_fn, "_record_these_stats", []):
        assert float(getattr(loss_fn, name)) >= 0, name


@of_losses
def test_names_of_sub_losses_are_those_it_returns(loss_class):
    x, labels = make()
    for options in ({}, {"embedding_regularizer": LpRegularizer()}):
        loss_fn = loss_class(**options)
        errors = loss_fn.compute_loss(x, labels, None, x, labels)
        loss_fn.add_embedding_regularization_to_loss_dict(errors, x)
        assert sorted(errors) == sorted(loss_fn.sub_loss_names())
        for name, error in errors.items():
            assert {"losses", "indices", "reduction_type"} <= set(error), name


@of_losses
@pytest.mark.parametrize(("size", "labels"), [(0, []), (1, [3]), (5, [2] * 5), (5, [4, 1, 0, 7, 2])])
def test_degenerate_batches_give_a_finite_loss_that_goes_backward(loss_class, size, labels):
    x = torch.randn(size, 4, requires_grad=True)
    loss = loss_class()(x, torch.tensor(labels, dtype=torch.long))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()
    if loss_class is DRSLoss:
        assert loss == 0


@of_losses
def test_empty_indices_and_references_give_zero(loss_class):
    x, labels = make()
    none = torch.zeros(0, dtype=torch.long)
    for indices, ref, ref_labels in (((none,) * 3, None, None), ((none,) * 4, None, None), ((none,) * 4, *make(1, 4))):
        loss = loss_class()(x, labels, indices, ref, ref_labels)
        loss.backward()
        assert loss == 0


@of_losses
def test_layout_of_the_input_does_not_matter(loss_class):
    x, labels = make()
    wanted = loss_class()(x, labels)
    transposed = x.detach().T.contiguous().T.requires_grad_()
    strided = torch.randn(30, 12)[::2, ::2].copy_(x.detach()).requires_grad_()
    strided_labels = labels.repeat_interleave(2)[::2]
    for other in (transposed, strided):
        assert not other.is_contiguous()
        loss = loss_class()(other, strided_labels)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(torch.autograd.grad(loss, other), torch.autograd.grad(wanted, x, retain_graph=True))


@pytest.mark.parametrize("gpu", DEVICES[1:])
def test_labels_may_be_on_the_cpu(gpu):
    (x, labels), (ref, ref_labels) = make(device=gpu), make(1, 21, device=gpu)
    for loss_class in LOSSES:
        wanted = loss_class()(x, labels)
        torch.testing.assert_close(loss_class()(x, labels.cpu()), wanted)
        wanted = loss_class()(x, labels, ref_emb=ref, ref_labels=ref_labels)
        torch.testing.assert_close(loss_class()(x, labels.cpu(), ref_emb=ref, ref_labels=ref_labels.cpu()), wanted)


@of_losses
def test_calls_change_neither_input_nor_loss(loss_class):
    x, labels = make()
    indices = lmu.get_all_pairs_indices(labels)
    inputs = [x.detach(), labels, *indices]
    before = [tensor.clone() for tensor in inputs]
    loss_fn = loss_class()
    first = loss_fn(x, labels, indices)
    first.backward()
    for tensor, copied in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copied)
    loss_fn(*make(2))
    assert torch.equal(loss_fn(x, labels, indices), first)


@of_losses
def test_is_copied_pickled_and_restored(loss_class):
    x, labels = make()
    loss_fn = loss_class(embedding_regularizer=LpRegularizer(), distance=CosineSimilarity(), collect_stats=True)
    wanted = loss_fn(x, labels)
    for twin in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        twin.load_state_dict(loss_fn.state_dict())
        assert torch.equal(twin(x, labels), wanted)
    assert loss_fn.to(torch.float64)(x, labels) == wanted


@of_losses
def test_no_gradient_is_needed(loss_class):
    x, labels = make()
    with torch.no_grad():
        assert not loss_class()(x, labels).requires_grad
    assert not loss_class()(x.detach(), labels).requires_grad


@pytest.mark.parametrize("reducer", [PerQueryReducer, PerIdentityReducer])
def test_our_reducers_are_pml_s(reducer):
    x, labels = make()
    assert_sound(ContrastiveLoss(reducer=reducer(collect_stats=True))(x, labels), x)
