"""The fused kernels against the eager path: their results in Triton's interpreter, their code by its compiler.

Neither needs a GPU. With one, `test_distances.py` compares the whole loss with the CPU's.
"""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from batches import pairwise

from pml_drsl import fused

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("pml_drsl.kernels")

# The interpreter is chosen when the kernels are defined, so it takes a process of its own.
IN_INTERPRETER = """
import torch
from pml_drsl import fused, kernels
from pml_drsl.losses import DRSLoss
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.miners import PairMarginMiner

eager = fused._kernels
calls = []

def interpreted(device_type):
    calls.append(True)
    return kernels

kernels.BLOCK = 4
torch.manual_seed(0)
for first, (dtype, tolerance) in enumerate(((torch.float64, 1e-12), (torch.float32, 1e-5))):
    x = torch.randn(7, 4, dtype=dtype, requires_grad=True)
    ref = torch.randn(9, 4, dtype=dtype, requires_grad=True)
    labels, ref_labels = torch.tensor([0, 1, 0, 77, 1, 0, 2]), torch.arange(9) % 4
    raw = LpDistance(normalize_embeddings=False)
    batches = (x, labels), (x, labels, None, ref, ref_labels), (x, labels, PairMarginMiner()(x, labels))
    # The kernels see options and arguments apart, so each option meets one kind of arguments, another for each dtype.
    for number, options in enumerate(
        ({"query_chunk_size": 4, "margin": 0.1}, {"distance": CosineSimilarity()},
         {"distance": raw, "bound_power": None}, {"bound_power": 1, "margin": 0.1, "collect_stats": True},
         {"bound_power": 0.1, "temperature": 0.02},
         {"bound_power": 0.1, "temperature": 0.003, "distance": CosineSimilarity()}), first):
        loss_fn, arguments = DRSLoss(**{"temperature": 0.1, **options}), batches[number % 3]
        results, calls[:] = [], []
        for fused._kernels in (eager, interpreted):
            loss = loss_fn(*arguments)
            results.append((loss, *torch.autograd.grad(loss, [x, ref] if len(arguments) > 3 else [x])))
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
        assert calls
print("agrees")
"""


def test_agrees_with_the_eager_path_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-c", IN_INTERPRETER],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "agrees", result.stderr


@pytest.mark.parametrize(
    ("dtype", "name", "bound", "capability"),
    pairwise(["fp32", "fp64"], ["_count", "_gradient"], [False, True], [80, 90]),
)
def test_compiles_for_gpus(name, dtype, bound, capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    if not hasattr(kernel, "arg_names"):
        pytest.skip("TRITON_INTERPRET is set")
    integers = {"query": "*i64", "first": "*i64", "columns": "i32"}
    signature = {argument: integers.get(argument, f"*{dtype}") for argument in kernel.arg_names}
    signature["BLOCK"] = signature["BOUND"] = "constexpr"
    source = ASTSource(kernel, signature, {"BLOCK": kernels.BLOCK, "BOUND": bound})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert ".visible .entry" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0


def test_where_the_kernels_do_not_run_it_says_so_and_goes_on(monkeypatch):
    def fails(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "count", fails)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: zeros(*sizes))
    with pytest.warns(UserWarning, match="slower path: Failed to find C compiler"):
        assert fused._kernels.__wrapped__("cuda") is None


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch):
    current = []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda z, *_, **__: started.append(current[-1] is z)

    started = []
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernels, "_count", Kernel())
    monkeypatch.setattr(kernels, "_gradient", Kernel())
    z, x, query = torch.zeros(2, 3), torch.zeros(4), torch.tensor([0, 0, 1, 1])
    kernels.count(z, x, query)
    kernels.gradient(z, x, query, x)
    assert started == [True, True] and not current
