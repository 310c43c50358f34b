"""Small awkward batches, the oracle's answer for them, the loss by its definition, and how tests choose their cases."""

import itertools

import pytest
import reference
import torch
from pytorch_metric_learning.distances import LpDistance

from pml_drsl.losses import DRSLoss

# A CUDA case exists only where a device does.
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]


def pairwise(*axes):
    """Cases that hold every pair of values of two axes at least once, few of them: the first that covers most pairs."""
    cases = list(itertools.product(*map(range, map(len, axes))))
    covered = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    missing, chosen = set().union(*covered.values()), []
    while missing:
        best = max(cases, key=lambda case: len(covered[case] & missing))
        missing -= covered[best]
        chosen.append(tuple(axis[index] for axis, index in zip(axes, best, strict=True)))
    return chosen


def make_batch(seed: int, size: int = 14, dim: int = 5, classes: int = 4, dtype=torch.float64):
    """Unequal classes, a lone identity, negative labels, no order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, dim, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(-2, classes - 2, (size,), generator=generator)
    labels[size // 2] = 99
    return x.requires_grad_(), labels


def expected(x, labels, ref=None, ref_labels=None, pairs=None, **kwargs):
    """Value and gradients (of x, and of ref where given) by the slow loop."""
    x = x.detach().double().requires_grad_()
    ref = None if ref is None else ref.detach().double().requires_grad_()
    if pairs is None:
        pairs = reference.pairs_from_labels(labels.tolist(), None if ref is None else ref_labels.tolist())
    value = reference.drsl(x, *pairs, ref, **kwargs)
    return value, torch.autograd.grad(value, [x] if ref is None else [x, ref])


def assert_agrees(actual, inputs, wanted, tolerance):
    value, gradients = wanted
    torch.testing.assert_close(actual.double(), value, rtol=0, atol=tolerance)
    for gradient, want in zip(torch.autograd.grad(actual, inputs), gradients, strict=True):
        assert torch.isfinite(gradient).all()
        # A gradient is of the order of 1 / temperature.
        torch.testing.assert_close(gradient.double(), want, rtol=tolerance, atol=tolerance * max(1.0, want.abs().max()))


def make_loss(temperature=0.01, sort_weight=0.3, margin=0.0, **options):
    """The definition, whatever the defaults of ``DRSLoss`` are."""
    return DRSLoss(temperature, sort_weight, margin, **{"bound_power": None, "distance": LpDistance(), **options})
