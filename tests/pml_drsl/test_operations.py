"""How often the loss makes a GPU wait, counted on the CPU by the operations that would."""

import pytest
import torch
from batches import make_loss
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pml_drsl.miners import NegativeBudgetMiner

# What reads a value from Python, and operations whose result has a size that depends on values.
READ = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"}
SIZED = {"nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount", "is_nonzero", "equal"}


class Reads(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READ:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Sized(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in SIZED or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.found.append(name)
        if name in ("index", "index_put_"):  # a mask of bool is turned into indices
            self.found += [name for index in args[1] if index is not None and index.dtype == torch.bool]
        return func(*args, **kwargs)


def waits(loss_fn, *arguments):
    """The operations of a forward and a backward pass that would make a GPU wait."""
    with Reads() as reads, Sized() as sized:
        loss_fn(*arguments).backward()
    return reads.found + sized.found


def batch():
    return torch.randn(256, 16, requires_grad=True), torch.arange(256) // 4


OPTIONS = {
    "definition": {},
    "bound": {"bound_power": 0.5, "distance": CosineSimilarity(), "temperature": 0.05},
    "retrieval only": {"bound_power": 0.5, "distance": CosineSimilarity(), "sort_weight": 0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_waits_once_with_its_statistics(name):
    x, labels = batch()
    found = waits(make_loss(**OPTIONS[name], collect_stats=True), x, labels)
    assert found == ["tolist"]  # the numbers of pairs, of queries, and of the largest class, together


def test_references_cost_no_more_waits():
    x, labels = batch()
    ref = torch.randn(200, 16, requires_grad=True)
    assert waits(make_loss(), x, labels, None, ref, torch.arange(200) // 4) == ["tolist"]


@pytest.mark.parametrize("distance", [LpDistance(), CosineSimilarity()])
def test_the_indices_of_a_miner_cost_few_waits(distance):
    x, labels = batch()
    indices = NegativeBudgetMiner(4)(x, labels)
    assert len(waits(make_loss(distance=distance), x, labels, indices)) <= 6


def test_statistics_stay_on_the_device_until_they_are_read():
    x, labels = batch()
    loss_fn = make_loss(collect_stats=True)
    loss_fn(x, labels)
    with Reads() as reads:
        values = [float(getattr(loss_fn, name)) for name in loss_fn._record_these_stats]
    assert reads.found == ["__float__"] * 2
    assert all(value > 0 for value in values)
