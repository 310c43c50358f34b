"""The sparse pairwise losses against a slow loop over their equations."""

import math

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from torch.nn import functional as F

from pml_drsl.checks import InputError
from torchreid_ext.benchmark.sparse_pairwise import SparsePairwiseLoss
from torchreid_ext.engine import criteria

PATH = "torchreid_ext.benchmark.sparse_pairwise.SparsePairwiseLoss"


def slow(mining, embeddings, labels, t):
    z = F.normalize(embeddings).tolist()

    def s(a, b):
        return sum(x * y for x, y in zip(z[a], z[b], strict=True))

    total, number = 0.0, 0
    for identity in sorted(set(labels)):
        own = [n for n, label in enumerate(labels) if label == identity]
        others = [n for n, label in enumerate(labels) if label != identity]
        if len(own) < 2:
            continue
        nearest = t * math.log(sum(math.exp(s(n, k) / t) for n in own for k in others))
        h = -t * math.log(sum(math.exp(-s(n, m) / t) for n in own for m in own))
        lh = t * math.log(sum(1 / sum(math.exp(-s(n, m) / t) for m in own) for n in own))
        a = 2 * h * lh / (h + lh) if h > 0 else 0.0
        positive = {"h": h, "lh": lh, "ada": a * h + (1 - a) * lh}[mining]
        total += math.log(1 + math.exp((nearest - positive) / t))
        number += 1
    return total / number


@pytest.mark.parametrize("mining", ["h", "lh", "ada"])
@pytest.mark.parametrize("spread", [0.1, 2.0], ids=["h above 0", "h below 0"])
def test_it_equals_a_loop_over_the_equations(mining, spread):
    generator = torch.Generator().manual_seed(3)
    labels = [4, 4, 4, 9, 9, 1, 1, 1, 1, 7]
    centres = torch.randn(10, 6, generator=generator, dtype=torch.float64)[labels]
    embeddings = (centres + spread * torch.randn(10, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    loss = SparsePairwiseLoss(mining, temperature=0.2)(embeddings, torch.tensor(labels))
    assert loss.item() == pytest.approx(slow(mining, embeddings.detach(), labels, 0.2), rel=1e-9)
    loss.backward()
    assert embeddings.grad.isfinite().all() and embeddings.grad.any()


def test_the_soft_choice_becomes_the_nearest_and_the_farthest_pair():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    z = F.normalize(torch.randn(6, 3, generator=generator, dtype=torch.float64))
    s, same, t = z @ z.T, labels[:, None] == labels, 1e-4
    loss = SparsePairwiseLoss("h", temperature=t)(z, labels) * t
    gaps = [(s[labels == i][:, labels != i].max() - s[labels == i][:, labels == i].min()).clamp(min=0) for i in (0, 1)]
    assert same.sum() == 18
    assert loss.item() == pytest.approx(torch.stack(gaps).mean().item(), abs=1e-3)


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]], ids=["one identity", "no pair"])
def test_a_batch_without_pairs_has_no_loss(labels):
    embeddings = torch.eye(4, requires_grad=True)
    loss = SparsePairwiseLoss()(embeddings, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0


def test_wrong_values_are_refused():
    for values in ({"mining": "easy"}, {"temperature": 0}):
        with pytest.raises(InputError, match="|".join(values)):
            SparsePairwiseLoss(**values)
    with pytest.raises(AssertionError):
        SparsePairwiseLoss(distance=LpDistance())


def test_a_class_is_named_by_its_dotted_path():
    table = criteria.TABLES["loss"]
    built = criteria.build("loss.pml.loss", {"name": PATH, "mining": "h"}, table)
    assert isinstance(built, SparsePairwiseLoss) and built.mining == "h"
    for name, says in (
        ("no.such.module.Loss", "cannot import"),
        (f"{PATH}es", "cannot import"),
        ("os.path.join", "is no loss"),
        ("subprocess.Popen", "is no loss"),
    ):
        with pytest.raises(InputError, match=says):
            criteria.build("loss.pml.loss", {"name": name}, table)
    with pytest.raises(InputError, match="takes no 'minning'"):
        criteria.build("loss.pml.loss", {"name": PATH, "minning": "h"}, table)
