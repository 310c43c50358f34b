"""Two processes that share a batch must give the loss and the gradient of one process that has all of it."""

import functools

import numpy as np
import processes
import pytest
import torch
from batches import make_batch, make_loss
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, SoftTripleLoss, TripletMarginLoss
from pytorch_metric_learning.miners import (
    BatchEasyHardMiner,
    DistanceWeightedMiner,
    MultiSimilarityMiner,
    TripletMarginMiner,
)
from pytorch_metric_learning.reducers import AvgNonZeroReducer, SumReducer
from pytorch_metric_learning.regularizers import LpRegularizer
from pytorch_metric_learning.utils import distributed as pml_distributed

from pml_drsl.checks import InputError
from pml_drsl.distributed import DistributedLossWrapper, DistributedMinerWrapper, gather_batch
from pml_drsl.miners import NegativeBudgetMiner, RankViolationMiner
from pml_drsl.reducers import PerIdentityReducer
from pml_drsl.wrappers import CrossBatchMemory

LOSSES = {
    "default": lambda: make_loss(0.1),
    "bound": lambda: make_loss(0.1, sort_weight=np.float64(0.5), bound_power=0.5, collect_stats=True),
    "chunks": lambda: make_loss(0.1, query_chunk_size=3, collect_stats=True),
    "raw": lambda: make_loss(0.3, distance=LpDistance(normalize_embeddings=False)),
    "per identity": lambda: make_loss(0.1, reducer=PerIdentityReducer()),
    "sum": lambda: make_loss(0.1, reducer=SumReducer(), sort_weight=0),
    "threshold": lambda: make_loss(0.1, reducer=AvgNonZeroReducer()),
    "contrastive": ContrastiveLoss,
    "regularizer": lambda: make_loss(0.1, embedding_regularizer=LpRegularizer(), embedding_reg_weight=0.3),
}
MINERS = {
    "none": lambda: None,
    "violations": lambda: RankViolationMiner(0.3),
    "budget": lambda: NegativeBudgetMiner(1, "semihard"),
    "triplets": lambda: TripletMarginMiner(0.3),
    "easiest": BatchEasyHardMiner,  # It chooses the query itself, where that is among the references.
    "multi-similarity": MultiSimilarityMiner,
}
# (loss, miner, efficient, references: True, False, the batch "itself" or "views" of it, sizes of the two shares)
CASES = [
    *((name, "none", name != "contrastive", False, (8, 8)) for name in LOSSES if name != "default"),
    *(("contrastive", miner, False, "views", (8, 8)) for miner in ("none", "multi-similarity")),
    *(("default", miner, efficient, False, (8, 8)) for miner in MINERS for efficient in (True, False)),
    *(("per identity", "budget", efficient, True, (5, 11)) for efficient in (True, False)),
    *(("default", "none", efficient, False, (15, 1)) for efficient in (True, False)),
    ("default", "none", True, False, "nobody's"),
    *(("default", miner, efficient, "itself", (8, 8)) for miner in ("none", "budget") for efficient in (True, False)),
    ("default", "triplets", False, "itself", (8, 8)),  # PML takes other labels for other images.
]


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 4, bias=False).double()
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-1, 1, 20).reshape(4, 5))

    def forward(self, x, ref):
        return self.layer(x), None if ref is None else self.layer(ref)


def make_case(case):
    """Inputs, labels, other references and their labels of the whole batch, and the sizes of the shares."""
    *_, with_ref, sizes = case
    x, labels = make_batch(15, size=16)
    ref, ref_labels = make_batch(16, size=16) if with_ref in (True, "views") else (None, None)
    if sizes == "nobody's":  # the second process has no query with a positive
        sizes = (8, 8)
        labels[8:] = torch.arange(100, 108)
    return x.detach(), labels, None if ref is None else ref.detach(), ref_labels, sizes


def with_references(case, output, labels, ref_labels):
    """Embeddings, references and their labels; the references may be the embeddings themselves."""
    embeddings, ref_emb = output
    if case[3] == "views":  # PML takes one object of labels for one batch, and leaves out its self-comparisons.
        return embeddings, ref_emb, labels
    return (embeddings, embeddings, labels.clone()) if case[3] == "itself" else (embeddings, ref_emb, ref_labels)


def stateful(wrap, wrap_miner, wrap_network, share):
    """What losses with weights, with a memory and with random numbers do in two steps, by name."""
    x, labels = make_batch(3, size=16)
    x, labels, found = x.detach(), labels.clamp(0, 3), {}
    losses = {"weights": SoftTripleLoss(4, 4), "memory": CrossBatchMemory(ContrastiveLoss(), 4, 40)}
    losses |= {"warm-up": CrossBatchMemory(ContrastiveLoss(), 4, 40, RankViolationMiner(0.3), warmup=1)}
    losses |= {"mined": TripletMarginLoss(), "drawn": TripletMarginLoss(triplets_per_anchor=1)}
    for name, loss_fn in losses.items():
        network, loss_fn = wrap_network(Network()), loss_fn.double()
        for parameter in loss_fn.parameters():
            parameter.data.copy_(torch.linspace(-1, 1, parameter.numel()).sin().view_as(parameter))
        for step in range(2):
            embeddings, _ = network(x[share] + step, None)
            given = {}
            if name == "memory" and step:
                given["enqueue_mask"] = (torch.arange(16) % 3 > 0)[share]
            if name == "mined":
                given["indices_tuple"] = wrap_miner(DistanceWeightedMiner())(embeddings, labels[share])
            loss = wrap(loss_fn)(embeddings, labels[share], **given)
            loss.backward()
            state = [part.grad for part in (*network.parameters(), *loss_fn.parameters())] + list(loss_fn.buffers())
            found[f"{name} {step}"] = [loss.detach(), *(part.clone() for part in state)]
    return found


def test_weights_memories_and_draws_are_those_of_one_process(found):
    torch.manual_seed(0)
    alone = stateful(lambda loss: loss, lambda miner: miner, lambda network: network, slice(None))
    for of_process in found:
        torch.testing.assert_close(of_process[-1], alone, rtol=1e-9, atol=1e-12)


def train_on_share(rank, world_size, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    found = []
    for case in CASES:
        name, miner, efficient, *_ = case
        *batch, sizes = make_case(case)
        share = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        x, labels, ref, ref_labels = (None if part is None else part[share] for part in batch)
        network = torch.nn.parallel.DistributedDataParallel(Network())
        embeddings, ref_emb, ref_labels = with_references(case, network(x, ref), labels, ref_labels)
        indices = None
        if MINERS[miner]() is not None:
            miner_fn = DistributedMinerWrapper(MINERS[miner](), efficient=efficient)
            indices = miner_fn(embeddings, labels, ref_emb, ref_labels)
        loss_fn = DistributedLossWrapper(LOSSES[name](), efficient=efficient)
        loss = loss_fn(embeddings, labels, indices, ref_emb, ref_labels)
        loss.backward()
        found.append((loss.detach(), network.module.layer.weight.grad))
    half = slice(0, 8) if rank == 0 else slice(8, None)
    ddp = torch.nn.parallel.DistributedDataParallel
    x, labels = make_batch(15, size=16)
    for efficient in (False, True):
        network = ddp(Network())
        loss_fn = pml_distributed.DistributedLossWrapper(make_loss(0.1), efficient=efficient)
        loss = loss_fn(network(x.detach()[half], None)[0], labels[half])
        loss.backward()
        found.append((loss.detach(), network.module.layer.weight.grad))
    # Other draws than those of the first, were they not shared.
    torch.manual_seed(rank)
    found.append(stateful(DistributedLossWrapper, DistributedMinerWrapper, ddp, half))
    for name in ("temperature", "margin"):
        learnable = make_loss(**{name: torch.tensor(0.1, requires_grad=True)}, fused=False)
        with pytest.raises(InputError, match=f"a learnable {name} needs efficient=False"):
            DistributedLossWrapper(learnable, efficient=True)(x[half], labels[half])
    assert torch.equal(gather_batch(torch.arange(rank + 1))[0], torch.tensor([0, 0, 1]))
    torch.save(found, f"{results}{rank}")
    torch.distributed.barrier()  # Meanwhile gloo frees the last tensors, for which torch would wait below without end.
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    processes.start(train_on_share, (2, folder / "store", folder / "results"), 2)
    return [torch.load(f"{folder / 'results'}{rank}", weights_only=True) for rank in range(2)]


def test_two_processes_agree_with_one(found):
    for index, case in enumerate(CASES):
        name, miner, *_ = case
        x, labels, ref, ref_labels, _ = make_case(case)
        network = Network()
        embeddings, ref_emb, ref_labels = with_references(case, network(x, ref), labels, ref_labels)
        indices = None if MINERS[miner]() is None else MINERS[miner]()(embeddings, labels, ref_emb, ref_labels)
        loss = LOSSES[name]()(embeddings, labels, indices, ref_emb, ref_labels)
        loss.backward()
        assert network.layer.weight.grad.abs().max() > 0.01, case
        for of_process in found:
            value, gradient = of_process[index]
            told = functools.partial("{}: {}".format, case)
            torch.testing.assert_close(value, loss.detach(), rtol=0, atol=1e-12, msg=told)
            torch.testing.assert_close(gradient, network.layer.weight.grad, rtol=1e-9, atol=1e-12, msg=told)


def test_pml_s_wrapper_returns_the_loss_times_the_number_of_processes_and_loses_gradients_if_efficient(found):
    x, labels = make_batch(15, size=16)
    network = Network()
    loss = make_loss(0.1)(network(x.detach(), None)[0], labels)
    loss.backward()
    wanted = network.layer.weight.grad
    for of_process in found:
        (value, gradient), (_, lossy) = of_process[len(CASES) : -1]
        torch.testing.assert_close(value, 2 * loss.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
        assert (lossy - wanted).norm() > 0.1 * wanted.norm()


def test_in_one_process_the_wrappers_do_nothing():
    x, labels = make_batch(1)
    loss = DistributedLossWrapper(make_loss(), efficient=True)(x, labels)
    assert torch.equal(loss, make_loss()(x, labels))
    for index, wanted in zip(
        DistributedMinerWrapper(RankViolationMiner())(x, labels), RankViolationMiner()(x, labels), strict=True
    ):
        assert torch.equal(index, wanted)


def test_in_one_process_a_memory_is_called_as_it_is():
    x, labels = make_batch(1)
    memory, wrapped = (CrossBatchMemory(make_loss(), x.shape[1], len(x)) for _ in range(2))
    assert torch.equal(DistributedLossWrapper(wrapped)(x, labels), memory(x, labels))
    keep = torch.arange(len(x)) < 5
    again = DistributedLossWrapper(wrapped)(x, labels, enqueue_mask=keep)
    assert torch.equal(again, memory(x, labels, enqueue_mask=keep))


def test_efficient_is_refused_for_other_losses():
    DistributedLossWrapper(ContrastiveLoss())
    for loss_fn in (ContrastiveLoss(), CrossBatchMemory(ContrastiveLoss(), 4, 16)):
        with pytest.raises(InputError, match=f"efficient=True is for DRSLoss, got {type(loss_fn).__name__}"):
            DistributedLossWrapper(loss_fn, efficient=True)
    with pytest.raises(TypeError, match="must extend BaseMetricLossFunction"):
        DistributedLossWrapper(torch.nn.Linear(2, 2), efficient=True)
    assert issubclass(DistributedLossWrapper, pml_distributed.DistributedLossWrapper)
