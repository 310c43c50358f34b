"""No tensor is made on the default device by chance: with the default elsewhere, an operation on both would fail.

On a GPU the same mistake mixes tensors of the GPU with tensors of the CPU. This needs none."""

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from torch.utils._device import DeviceContext

from pml_drsl import distances, functional, large_batch, losses, miners, pairs, reducers, wrappers
from torchreid_ext.benchmark.sparse_pairwise import SparsePairwiseLoss

MINER = miners.NegativeBudgetMiner(2, "random", seed=0, positives=1)
LOSSES = {
    "defaults": losses.DRSLoss(collect_stats=True),
    "definition": losses.DRSLoss(bound_power=None, distance=LpDistance(), fused=False, query_chunk_size=5),
    "raw": losses.DRSLoss(distance=LpDistance(normalize_embeddings=False), reducer=reducers.PerIdentityReducer()),
    "memory": wrappers.CrossBatchMemory(losses.DRSLoss(), 8, 40, MINER, warmup=1),
    "sparse": SparsePairwiseLoss(),
    "large batch": large_batch.LargeBatch(torch.nn.Linear(8, 8), losses.DRSLoss(), 7, miners.RankViolationMiner(0.5)),
}


class Elsewhere(DeviceContext):
    """``with torch.device("meta")``, in the backward pass too, where torch leaves the default device out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.backward:
            return super().__torch_function__(func, types, args, kwargs)
        (loss,) = args
        with self:
            options = {"allow_unreachable": True, "accumulate_grad": True}
            torch.autograd.graph._engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), **options)


def step(loss_fn, *arguments):
    x, labels = torch.randn(24, 8, requires_grad=True), torch.arange(24) // 4
    with Elsewhere(torch.device("meta")):
        loss_fn(x, labels, *arguments).backward()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("blocks", [False, True])
def test_the_default_device_does_not_matter(name, blocks, monkeypatch):
    monkeypatch.setattr(functional, "BLOCK", 200 if blocks else functional.BLOCK)
    for _ in range(3):
        step(LOSSES[name])


def test_a_tensor_on_the_default_device_is_noticed(monkeypatch):
    monkeypatch.setattr(pairs, "_columns", lambda query, counts: torch.arange(len(query)))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step(losses.DRSLoss())


def test_it_is_noticed_in_the_backward_pass_too(monkeypatch):
    monkeypatch.setattr(distances, "check_once", lambda: torch.zeros(2) + torch.zeros(2, device="cpu"))
    with pytest.raises(RuntimeError, match="meta"):
        step(losses.DRSLoss())
