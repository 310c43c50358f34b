"""A batch embedded in chunks must give the loss and the gradients of the batch embedded at once."""

import copy
import random

import numpy as np
import processes
import pytest
import torch
from batches import DEVICES, make_batch, pairwise
from pytorch_metric_learning import losses, miners
from torch import nn
from torch.nn.functional import cross_entropy

from pml_drsl import DRSLoss, LargeBatch, RankViolationMiner, forward_in_chunks
from pml_drsl.checks import InputError
from pml_drsl.wrappers import CrossBatchMemory, DistributedLossWrapper, DistributedMinerWrapper

SIZE, FEATURES, DIM, CLASSES = 16, 5, 4, 6
LOSSES = {
    "DRSL": lambda: DRSLoss(0.1),
    "ArcFace": lambda: losses.ArcFaceLoss(CLASSES, DIM),
    "MultipleLosses": lambda: losses.MultipleLosses([losses.ContrastiveLoss(), losses.SupConLoss()], weights=[1, 0.5]),
    "DRSL in a memory": lambda: CrossBatchMemory(DRSLoss(0.1), DIM, 40),
}
MINERS = {
    "none": lambda: None,
    "pairs": lambda: RankViolationMiner(0.3),
    "triplets": lambda: miners.TripletMarginMiner(),
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


class Recorded(nn.Sequential):
    """A sequence of layers that notes how many images it saw, and whether with a graph."""

    def forward(self, x):
        self.seen = [*getattr(self, "seen", []), (len(x), torch.is_grad_enabled())]
        return super().forward(x)


def make_network(*middle, dtype=torch.float64, device="cpu"):
    torch.manual_seed(1)
    network = Recorded(nn.Linear(FEATURES, 8), nn.Tanh(), *middle, nn.Linear(8, DIM))
    return network.to(device=device, dtype=dtype)


def make_data(dtype=torch.float64, device="cpu", seed=3):
    x, labels = make_batch(seed, size=SIZE, dim=FEATURES, dtype=dtype)
    return x.detach().to(device), (labels % CLASSES).to(device)


def make_loss(name, dtype=torch.float64, device="cpu"):
    torch.manual_seed(2)
    return LOSSES[name]().to(device=device, dtype=dtype)


def by_hand(network, images, number):
    """The network's output by chunks, with one graph for all: what the chunked pass has to be differentiated as."""
    return torch.cat([network(chunk) for chunk in images.tensor_split(number)])


def state(*modules):
    gradients = [parameter.grad for module in modules for parameter in module.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    return gradients, [buffer for module in modules for buffer in module.buffers()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "name", "miner", "chunk_size"), pairwise(list(TOLERANCE), list(LOSSES), list(MINERS), [1, 7, SIZE])
)
def test_gradients_are_the_whole_batch_s(dtype, name, miner, chunk_size, device):
    found = []
    for size in (chunk_size, None):
        network = make_network(dtype=dtype, device=device)
        loss_fn, miner_fn = make_loss(name, dtype, device), MINERS[miner]()
        if isinstance(loss_fn, CrossBatchMemory):
            # A memory's miner is its own: a miner outside would not know the memory.
            loss_fn.miner, miner_fn = miner_fn, None
        large_batch = LargeBatch(network, loss_fn, size, miner_fn) if size else None
        # Gradients add up over the steps; a memory has other embeddings in the second.
        for seed in (3, 4):
            images, labels = make_data(dtype, device, seed)
            if large_batch is None:
                embeddings = network(images)
                given = {} if miner_fn is None else {"indices_tuple": miner_fn(embeddings, labels)}
                loss = loss_fn(embeddings, labels, **given)
            else:
                loss = large_batch(images, labels)
            loss.backward()
        found.append((loss.detach(), state(network, loss_fn)))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def test_the_graph_is_of_one_chunk_at_a_time():
    network, (images, labels) = make_network(), make_data()
    loss = LargeBatch(network, DRSLoss(), 6)(images, labels)
    assert network.seen == [(6, False), (5, False), (5, False)]
    loss.backward()
    assert network.seen[3:] == [(6, True), (5, True), (5, True)]
    network.seen.clear()
    LargeBatch(network, DRSLoss(), SIZE)(images, labels).backward()
    assert network.seen == [(SIZE, True)]


class Scaled(nn.Module):
    """A random layer that draws from the generators of Python and numpy."""

    def forward(self, x):
        return x * (random.random() + np.random.random(x.shape[1:])[0])


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def drawn(device):
    return torch.rand(3, device=device).tolist(), torch.rand(1).item(), random.random(), np.random.random()


@pytest.mark.parametrize("device", DEVICES)
def test_both_passes_of_random_and_stateful_layers_are_alike(device):
    # A spectral norm's power iteration goes on with every forward pass in training.
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    network = make_network(nn.BatchNorm1d(8), nn.Dropout(0.4), Scaled(), linear, device=device)
    other, (images, labels) = copy.deepcopy(network), make_data(device=device)
    seed_all(5)
    wanted = DRSLoss(0.1)(by_hand(other, images, 3), labels)
    wanted.backward()
    after = [drawn(device) for _ in range(3)]
    seed_all(5)
    loss = LargeBatch(network, DRSLoss(0.1), 6)(images, labels)
    # What is drawn between the passes, or after them, is no business of theirs.
    between = [drawn(device) for _ in range(2)]
    loss.backward()
    assert [*between, drawn(device)] == after
    torch.testing.assert_close((loss, state(network)), (wanted, state(other)), rtol=1e-9, atol=1e-12)


def test_running_statistics_count_every_image_once_also_without_a_backward_pass():
    network, (images, labels) = make_network(nn.BatchNorm1d(8)), make_data()
    loss = LargeBatch(network, DRSLoss(), 4)(images, labels)
    first = [buffer.clone() for buffer in network.buffers()]
    assert network[2].num_batches_tracked == 4
    loss.backward()
    torch.testing.assert_close(list(network.buffers()), first, rtol=0, atol=0)


class Positions(nn.Module):
    """Adds tables, one that the first forward pass makes, and one that it makes larger."""

    def __init__(self):
        super().__init__()
        self.register_buffer("made", None)
        self.register_buffer("enlarged", torch.zeros(1))

    def forward(self, x):
        if self.made is None:
            self.made = torch.linspace(0, 1, x.shape[1], dtype=x.dtype)
        if len(self.enlarged) < x.shape[1]:
            self.enlarged = torch.linspace(1, -1, x.shape[1], dtype=x.dtype)
        return x + self.made * self.enlarged


def test_buffers_that_the_first_pass_makes_or_resizes():
    network, (images, labels) = make_network(Positions()), make_data()
    other = copy.deepcopy(network)
    loss = LargeBatch(network, DRSLoss(0.1), 5)(images, labels)
    loss.backward()
    wanted = DRSLoss(0.1)(other(images), labels)
    wanted.backward()
    torch.testing.assert_close((loss, state(network)), (wanted, state(other)), rtol=1e-9, atol=1e-12)


def test_another_forward_pass_shares_the_backward_pass():
    # Its graph holds the buffers, which the second pass of the chunks moves back and forth.
    network, (images, labels) = make_network(nn.BatchNorm1d(8)), make_data()
    other = copy.deepcopy(network)
    more, more_labels = make_data(seed=4)
    losses_of_more = [DRSLoss(0.1)(net(more), more_labels) for net in (network, other)]
    # What was computed last is differentiated first.
    loss = LargeBatch(network, DRSLoss(0.1), 6)(images, labels)
    wanted = DRSLoss(0.1)(by_hand(other, images, 3), labels)
    (losses_of_more[0] + loss).backward()
    (losses_of_more[1] + wanted).backward()
    torch.testing.assert_close(state(network), state(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside autocast", "backward inside autocast"])
def test_autocast_and_grad_scaler(inside, device):
    network = make_network(nn.Dropout(0.3), dtype=torch.float32, device=device)
    other, (images, labels) = copy.deepcopy(network), make_data(torch.float32, device)
    large_batch, found, precisions = LargeBatch(network, DRSLoss(0.1), 6), [], []
    network[0].register_forward_hook(lambda layer, given, output: precisions.append(output.dtype))
    for net, embed in ((network, lambda x: forward_in_chunks(network, x, 6)), (other, lambda x: by_hand(other, x, 3))):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
        torch.manual_seed(5)
        with torch.autocast(device, torch.bfloat16):
            loss = large_batch(images, labels) if net is network else DRSLoss(0.1)(embed(images), labels)
            if inside:
                scaler.scale(loss).backward()
        if not inside:
            scaler.scale(loss).backward()
        assert set(precisions) == {torch.bfloat16}
        scaler.unscale_(optimizer)
        assert net[0].weight.grad.abs().max() > 1e-3
        found.append([parameter.grad.clone() for parameter in net.parameters()])
        scaler.step(optimizer)
        found[-1] += [parameter.detach() for parameter in net.parameters()]
    # Half precision rounds the sum over a chunk and the sum over chunks differently: of 8 binary digits one is lost.
    torch.testing.assert_close(*found, rtol=2**-6, atol=2**-10)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.unused = make_network(), nn.Linear(DIM, CLASSES).double(), nn.Linear(DIM, 2).double()

    def forward(self, x):
        features = self.body(x)
        return {"both": (self.head(features), features), "more": [self.unused(features), features.argmax(1)]}


def two_losses(output, labels):
    logits, features = output["both"]
    assert output["more"][1].shape == labels.shape
    return cross_entropy(logits, labels) + DRSLoss(0.1)(features, labels)


def test_a_network_with_several_outputs_of_which_the_loss_leaves_some_out():
    images, labels = make_data()
    network, other = TwoHeads(), TwoHeads()
    other.load_state_dict(network.state_dict())
    LargeBatch(network, two_losses, 5)(images, labels).backward()
    two_losses(other(images), labels).backward()
    assert network.unused.weight.grad is None
    for part in ("body", "head"):
        torch.testing.assert_close(state(getattr(network, part)), state(getattr(other, part)), rtol=1e-9, atol=1e-12)


def test_gradients_reach_the_images_and_no_frozen_weight():
    images, labels = make_data()
    network, gradients = make_network(), []
    network[0].requires_grad_(False)
    for chunk_size in (5, SIZE):
        given = images.clone().requires_grad_()
        LargeBatch(network, DRSLoss(0.1), chunk_size)(given, labels).backward()
        gradients.append(given.grad)
    assert network[0].weight.grad is None
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    network.requires_grad_(False)
    assert not LargeBatch(network, DRSLoss(0.1), 5)(images, labels).requires_grad
    with torch.no_grad():
        assert not LargeBatch(make_network(), DRSLoss(0.1), 5)(images, labels).requires_grad


def test_a_second_backward_pass_repeats_the_first():
    network, (images, labels) = make_network(nn.Dropout(0.4)), make_data()
    loss = LargeBatch(network, DRSLoss(0.1), 5)(images, labels)
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in network.parameters()]
    loss.backward()
    torch.testing.assert_close([p.grad for p in network.parameters()], [2 * g for g in once], rtol=1e-12, atol=0)


def test_a_second_derivative_is_refused():
    loss = LargeBatch(make_network(), DRSLoss(0.1, fused=False), 5)(*make_data())
    with pytest.raises(InputError, match="LargeBatch can be differentiated once"):
        loss.backward(create_graph=True)


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: "x", "must return a tensor, or tuples, lists or dictionaries of tensors.* type str"),
        (lambda x: (x, None), "type NoneType"),
        (lambda x: x.mean(), r"shape \(\) for (5|4|16) images; every tensor must have one row for each image"),
        (lambda x: x[:2], r"shape \(2, 5\) for (5|4|16) images"),
    ],
)
def test_a_network_that_returns_something_else_is_refused(what, message):
    for chunk_size in (5, SIZE):
        with pytest.raises(InputError, match=message):
            LargeBatch(Returns(what), DRSLoss(), chunk_size)(*make_data())


def test_bad_input_is_refused():
    images, labels = make_data()
    for chunk_size in (0, -1, 2.5, True, None):
        with pytest.raises(InputError, match=f"chunk_size must be an integer of 1 or more, got {chunk_size}"):
            LargeBatch(make_network(), DRSLoss(), chunk_size)
    with pytest.raises(InputError, match="Module, got function"):
        forward_in_chunks(lambda x: x, images, 5)
    large_batch = LargeBatch(make_network(), DRSLoss(), 5)
    with pytest.raises(InputError, match=r"one image or more, got shape \(0, 5\)"):
        large_batch(images[:0], labels[:0])
    with pytest.raises(InputError, match="one image or more, got list"):
        large_batch(images.tolist(), labels)
    with pytest.raises(InputError, match="16 images and 15 labels; give one label for each image"):
        large_batch(images, labels[1:])
    mined = LargeBatch(make_network(), DRSLoss(), 5, RankViolationMiner())
    with pytest.raises(InputError, match="an indices_tuple was given, and there is a miner"):
        mined(images, labels, indices_tuple=RankViolationMiner()(images, labels))
    with pytest.raises(InputError, match="the network returned a dict, and a miner takes embeddings alone"):
        LargeBatch(TwoHeads(), DRSLoss(), 5, RankViolationMiner())(images, labels)


def test_arguments_of_the_loss_and_what_it_shows():
    images, labels = make_data()
    network = make_network()
    references, reference_labels = torch.randn(20, DIM).double(), torch.arange(20) % 6
    given = {"ref_emb": references, "ref_labels": reference_labels}
    for miner in (None, RankViolationMiner(0.3), miners.TripletMarginMiner()):
        loss = LargeBatch(network, DRSLoss(0.1), 5, miner)(images, labels, **given)
        mined = None if miner is None else miner(network(images), labels, **given)
        torch.testing.assert_close(loss, DRSLoss(0.1)(network(images), labels, mined, **given))
    shown = LargeBatch(network, make_loss("ArcFace"), 5)
    assert "chunk_size=5" in repr(shown)
    assert len(list(shown.parameters())) == 5


# (loss, miner, sizes of the two shares)
SHARED = [
    *((name, "none", (8, 8)) for name in LOSSES),
    ("DRSL", "pairs", (5, 11)),
    ("DRSL", "triplets", (15, 1)),
    ("efficient DRSL", "none", (5, 11)),
]


def train_on_share(rank, world_size, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    found = []
    for name, miner, sizes in [*SHARED, ("two heads", "none", (5, 11))]:
        share = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        images, labels = (part[share] for part in make_data())
        two_heads, reductions = name == "two heads", []
        network = nn.parallel.DistributedDataParallel(
            TwoHeads() if two_heads else make_network(nn.Dropout(0)), find_unused_parameters=two_heads
        )
        network.register_comm_hook(None, lambda _, bucket, seen=reductions: _reduced(bucket, seen))
        efficient = name.startswith("efficient")
        loss_fn = make_loss("DRSL" if two_heads or efficient else name)
        # PML's wrapper takes one loss. Each of several losses has a wrapper of its own.
        if name == "MultipleLosses":
            loss_fn.losses = nn.ModuleList(DistributedLossWrapper(part) for part in loss_fn.losses)
        wrapped = loss_fn if name == "MultipleLosses" else DistributedLossWrapper(loss_fn, efficient=efficient)
        miner_fn = None if miner == "none" else DistributedMinerWrapper(MINERS[miner]())

        def of_both(output, labels, wrapped=wrapped):
            logits, features = output["both"]
            return wrapped(features, labels) + cross_entropy(logits, labels, reduction="sum") * 2 / SIZE

        loss = LargeBatch(network, of_both if two_heads else wrapped, 3, miner_fn)(images, labels)
        assert reductions == []
        loss.backward()
        used = [p.grad for p in (*network.parameters(), *loss_fn.parameters()) if p.grad is not None]
        assert len(reductions) == 1, name
        found.append((loss.detach(), used))
    with pytest.raises(InputError, match="leave static_graph out"):
        LargeBatch(nn.parallel.DistributedDataParallel(make_network(), static_graph=True), DRSLoss(), 3)
    torch.save(found, f"{results}{rank}")
    torch.distributed.barrier()  # Meanwhile gloo frees the last tensors, for which torch would wait below without end.
    torch.distributed.destroy_process_group()


def _reduced(bucket, seen):
    seen.append(bucket.index())
    reduced = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
    return reduced.then(lambda future: future.value()[0])


def test_two_processes_agree_with_one_and_reduce_once_a_step(tmp_path):
    processes.start(train_on_share, (2, tmp_path / "store", tmp_path / "results"), 2)
    images, labels = make_data()
    of_processes = [torch.load(tmp_path / f"results{rank}", weights_only=True) for rank in range(2)]
    for index, (name, miner, _) in enumerate(SHARED):
        network, loss_fn = make_network(), make_loss(name.removeprefix("efficient "))
        embeddings = network(images)
        given = {} if miner == "none" else {"indices_tuple": MINERS[miner]()(embeddings, labels)}
        wanted = loss_fn(embeddings, labels, **given)
        wanted.backward()
        for found in of_processes:
            loss, gradients = found[index]
            wanted_gradients, _ = state(network, loss_fn)
            torch.testing.assert_close((loss, gradients), (wanted.detach(), wanted_gradients), rtol=1e-9, atol=1e-12)
    network = TwoHeads()
    two_losses(network(images), labels).backward()
    for found in of_processes:
        _, gradients = found[-1]
        wanted_gradients = [p.grad for p in network.parameters() if p.grad is not None]
        torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-9, atol=1e-12)
