"""The readable definition against the slow loop, and the loss (the fast path) against the readable definition."""

import inspect

import pytest
import reference
import torch
from batches import assert_agrees, expected, make_batch, make_loss
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance

from pml_drsl import functional

DISTANCES = {
    "euclidean": (LpDistance(), reference.euclidean),
    "cosine": (CosineSimilarity(), reference.negative_cosine),
}


def masks(labels, ref_labels=None):
    """Dense positives and negatives; without references no query is its own candidate."""
    same = labels[:, None] == (labels if ref_labels is None else ref_labels)
    return same & ~torch.eye(len(labels), dtype=torch.bool) if ref_labels is None else same, ~same


def by_definition(x, labels, distance, ref=None, ref_labels=None, **settings):
    refs = x if ref is None else ref
    d = distance(x, refs) * (-1 if distance.is_inverted else 1)
    u = (1 - torch.nn.functional.cosine_similarity(x[:, None], refs, dim=2)) / 2
    return functional.drsl(d, *masks(labels, ref_labels), u, **settings)


SETTINGS = [
    {"temperature": temperature, "sort_weight": sort_weight, "margin": margin, "bound": bound}
    for temperature, margin in ((0.05, 0.0), (0.3, 0.1))
    for sort_weight in (0, 0.7)
    for bound in (False, True)
] + [
    {"temperature": 0.1, "sort_weight": 0.7, "margin": 0.1, "bound": True, "bound_power": power} for power in (0.1, 0.5)
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("with_ref", [False, True])
def test_the_definition_agrees_with_the_slow_loop_and_the_loss_with_the_definition(settings, name, with_ref):
    distance, slow = DISTANCES[name]
    x, labels = make_batch(3, size=10)
    ref, ref_labels = make_batch(4, size=13) if with_ref else (None, None)
    inputs = [x, ref] if with_ref else [x]
    definition = by_definition(x, labels, distance, ref, ref_labels, **settings)
    # The gradient of a distance of 0, that of a query from itself, is not a number in PML's distances.
    wanted = expected(x, labels, ref, ref_labels, **settings, distance=slow)
    torch.testing.assert_close(definition, wanted[0], rtol=0, atol=1e-9)
    loss = make_loss(**settings, distance=distance)(x, labels, None, ref, ref_labels)
    torch.testing.assert_close(loss, definition, rtol=0, atol=1e-9)
    if with_ref or name == "cosine":
        assert_agrees(definition, inputs, wanted, 1e-8)
    assert_agrees(loss, inputs, wanted, 1e-8)


@pytest.mark.parametrize("labels", [[1, 1, 1], [1, 2, 3]])
def test_the_definition_of_a_batch_without_a_term_is_0(labels):
    x = torch.randn(3, 4, dtype=torch.float64)
    assert by_definition(x, torch.tensor(labels), LpDistance(), temperature=0.1, sort_weight=0.3) == 0


def test_the_definition_fits_on_one_screen():
    source = inspect.getsource(functional.drsl)
    body = source.split('"""')[-1].strip().splitlines()
    assert len([line for line in body if line.strip()]) <= 25
