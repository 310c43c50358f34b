"""Distances and their gradients are computed in full precision, whatever the user's settings are."""

import threading

import pytest
import torch
from batches import DEVICES, make_batch, make_loss
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from torch.utils._python_dispatch import TorchDispatchMode

from pml_drsl.machine import full_precision
from pml_drsl.miners import NegativeBudgetMiner, RankViolationMiner

PRODUCTS = {"mm", "addmm", "_euclidean_dist", "_cdist_forward"}


@pytest.fixture(autouse=True)
def reduced():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield setting()
    assert setting() != "ieee", "the settings were not restored"
    torch.set_float32_matmul_precision(before)


def setting():
    return getattr(torch.backends.cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()


class Watch(TorchDispatchMode):
    """Records the precision setting at every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.seen.append((name, setting(), torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("distance", [LpDistance(), CosineSimilarity(), DotProductSimilarity(power=2), LpDistance(p=1)])
@pytest.mark.parametrize("with_ref", [False, True])
def test_the_loss_takes_its_products_in_full_precision_forward_and_backward(distance, with_ref):
    x, labels = make_batch(0, size=32, dtype=torch.float32)
    ref, ref_labels = make_batch(1, size=40, dtype=torch.float32) if with_ref else (None, None)
    loss_fn = make_loss(0.1, distance=distance)
    wanted = loss_fn(x, labels, None, ref, ref_labels)
    (wanted_gradient,) = torch.autograd.grad(wanted, x)
    with Watch() as watch, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn(x, labels, None, ref, ref_labels)
        number = len(watch.seen)
        loss.backward()
    assert torch.equal(loss, wanted) and torch.equal(x.grad, wanted_gradient)
    assert 0 < number < len(watch.seen)
    assert {(precision, autocast) for _, precision, autocast in watch.seen} <= {("ieee", False), ("highest", False)}


@pytest.mark.parametrize("miner", [RankViolationMiner(0.1), NegativeBudgetMiner(2), NegativeBudgetMiner(2, "semihard")])
def test_miners_take_their_products_in_full_precision(miner):
    with Watch() as watch:
        miner(*make_batch(0, size=32, dtype=torch.float32))
    assert {precision for _, precision, _ in watch.seen} <= {"ieee", "highest"}
    assert watch.seen


def test_blocks_may_be_nested_and_run_in_threads():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with full_precision("cpu"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    before = setting()
    with full_precision("cpu"):
        with full_precision("cpu"):
            pass
        assert setting() in ("ieee", "highest")
        thread.start()
        entered.wait(10)
    assert setting() in ("ieee", "highest")  # the other thread still needs it
    leave.set()
    thread.join()
    assert setting() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has no settings to inherit")
def test_an_inherited_setting_stays_inherited():
    switches, before = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), torch.backends.fp32_precision
    try:
        for switch in switches:
            switch.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        with full_precision("cpu"):
            assert [switch.fp32_precision for switch in switches] == ["ieee"] * 2
        assert [switch.fp32_precision for switch in switches] == ["tf32"] * 2
        torch.backends.fp32_precision = "ieee"
        assert [switch.fp32_precision for switch in switches] == ["ieee"] * 2
    finally:
        torch.backends.fp32_precision = before
        torch.set_float32_matmul_precision("high")


@pytest.mark.parametrize("gpu", DEVICES[1:])
@pytest.mark.parametrize("distance", [LpDistance(), CosineSimilarity()])
def test_cuda_tensor_float_32_changes_nothing(distance, gpu):
    x, labels = (t.to(gpu) for t in make_batch(2, size=64, dim=64, dtype=torch.float32))
    results = []
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        y = x.detach().requires_grad_()
        loss = make_loss(distance=distance)(y, labels)
        loss.backward()
        results.append((loss.detach(), y.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)
