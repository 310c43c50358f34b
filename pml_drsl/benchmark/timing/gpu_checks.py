"""The parts of ``drsl-benchmark gpu`` that check results: tests, training, evaluation and NCCL."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import pml_drsl
from pml_drsl.benchmark.timing.evaluation import Task, make_search
from pml_drsl.benchmark.timing.gpu_row import Row, Setting
from pml_drsl.benchmark.timing.table import time_text
from pml_drsl.checks import InputError
from pml_drsl.evaluation.scores import evaluate
from pml_drsl.losses import DRSLoss
from pml_drsl.wrappers import DistributedLossWrapper

REPOSITORY = Path(pml_drsl.__file__).parents[1]


def tests(setting: Setting) -> Iterator[Row]:
    """Every CUDA test. Without a GPU the tests skip themselves."""
    report = setting.folder / "tests.xml"
    # A test that hangs must leave time for the others.
    options = ["-m", "cuda", "-q", "-p", "no:cacheprovider", "-o", "timeout=60", f"--junitxml={report}"]
    _require("tests")
    status = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=REPOSITORY).returncode
    if not report.is_file():
        raise RuntimeError(f"pytest ended with status {status} before it ran a test")
    outcomes = {
        f"{case.get('classname')}.{case.get('name')}": {child.tag for child in case}
        for case in ElementTree.parse(report).iter("testcase")
    }
    failed = [name for name, tags in outcomes.items() if tags & {"failure", "error"}]
    skipped = sum("skipped" in tags for tags in outcomes.values())
    passed = len(outcomes) - len(failed) - skipped
    right = status == 0 and not failed and (passed > 0 or not setting.on_gpu)
    yield Row("`pytest -m cuda`", f"{passed} passed, {len(failed)} failed, {skipped} skipped", right)
    for name in failed:
        yield Row(f"`{name}`", "failed", False)


def fp16(setting: Setting) -> Iterator[Row]:
    """The demo in mixed precision: fp16 on the GPU, and bf16 in a rehearsal, because a CPU is slow in fp16."""
    yield _train(setting, "amp", "train.amp", "fp16" if setting.on_gpu else "bf16")


def neck(setting: Setting) -> Iterator[Row]:
    """The demo with the batch-normalisation neck of the strong baseline."""
    yield _train(setting, "neck", "model.bnneck", "True")


def _train(setting: Setting, name: str, *options: str, launcher: tuple[str, ...] = (), epochs: int = 8) -> Row:
    """Trains the demo, and compares the test scores before and after.

    Args:
        setting: how to run the part.
        name: name of the folder for the checkpoints.
        *options: keys and values of the configuration.
        launcher: arguments of Python before ``-m torchreid_ext``, for example of torchrun.
        epochs: number of epochs.
    """
    _require("configs")
    save_dir = setting.folder / name
    options = (*options, "train.max_epoch", str(1 if setting.quick else epochs), "test.picture", "0")
    if setting.quick:
        options += ("data.height", "64", "data.width", "32")
    command = [
        *(sys.executable, *launcher, "-m", "torchreid_ext"),
        *("--config-file", str(REPOSITORY / "configs/demo.yaml"), "--root", str(setting.folder / "data")),
        *("data.save_dir", str(save_dir), "use_gpu", str(setting.on_gpu), *options),
    ]
    started = time.perf_counter()
    status = subprocess.run(command).returncode
    seconds = time.perf_counter() - started
    if status != 0:
        raise RuntimeError(f"training ended with status {status}: {' '.join(command)}")
    before, after = (
        json.loads((save_dir / file).read_text(encoding="utf-8"))["synthetic_pedestrians"]["mAP"]
        for file in ("untrained/metrics.json", "metrics.json")
    )
    learned = setting.quick or after > 1.2 * before
    return Row(
        f"demo with `{' '.join(options[:4])}`", f"mAP {before:.1%} before, {after:.1%} after, {seconds:.0f} s", learned
    )


def evaluation(setting: Setting) -> Iterator[Row]:
    """The evaluation on the GPU beside the CPU, plain and re-ranked. Features start in the CPU's memory."""
    threads = torch.get_num_threads()
    plain = Task(3368, 15913, 2048, 750, 6, False, threads)
    reranked = Task(500, 2000, 512, 100, 6, True, threads)
    if setting.quick:
        plain, reranked = Task(60, 300, 64, 20, 3, False, threads), Task(40, 100, 64, 10, 3, True, threads)
    # Re-ranking compares neighbour lists, which rounding can change.
    for task, tolerance in ((plain, 1e-4), (reranked, 1e-3)):
        search: dict[str, Any] = make_search(task)
        scores, times = {}, {}
        for device in ("cpu", setting.device):
            evaluate(**search, rerank=task.rerank, device=device)  # The first call loads libraries.
            started = time.perf_counter()
            # The result is made of numbers on the CPU, so the GPU has finished.
            scores[device] = evaluate(**search, rerank=task.rerank, device=device).mAP
            times[device] = time.perf_counter() - started
        difference = abs(scores[setting.device] - scores["cpu"])
        name = f"{task.queries:,} queries, {task.gallery:,} gallery images, {task.dim:,} dimensions"
        both = f"{time_text(times[setting.device])}, on the CPU {time_text(times['cpu'])}"
        yield Row(
            f"{name}{', re-ranked' if task.rerank else ''}",
            f"{both}; mAP differs by {difference:.0e}",
            difference <= tolerance,
        )


def nccl(setting: Setting) -> Iterator[Row]:
    """NCCL with one process: the exchange of the distributed loss, DistributedDataParallel, and torchrun."""
    device = torch.device("cuda", 0) if setting.on_gpu else torch.device("cpu")
    backend = "nccl" if setting.on_gpu else "gloo"
    options: dict[str, Any] = {}
    if setting.on_gpu:
        torch.cuda.set_device(device)
        options["device_id"] = device
    store = f"file://{setting.folder}/store"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1, **options)
    try:
        yield from _exchanges(device, backend)
    finally:
        dist.destroy_process_group()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    row = _train(setting, "torchrun", "train.amp", "off", launcher=launcher, epochs=2)
    # Two epochs show that torchrun works, not that the network learns.
    yield Row(f"torchrun, one process, {row.measurement}", row.figure)


def _exchanges(device: torch.device, backend: str) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(64, 32, generator=generator).to(device), torch.arange(64, device=device) // 4
    wanted = _loss_and_gradient(DRSLoss(), x, labels)
    for efficient in (False, True):
        wrapper = DistributedLossWrapper(DRSLoss(), efficient)

        # Called with the true number of processes, 1, the wrapper would leave the exchange out.
        def exchanged(x: Tensor, labels: Tensor, wrapper: Any = wrapper) -> Tensor:
            loss: Tensor = wrapper.forward_regular_loss(x, labels, None, None, None, world_size=2)
            return loss

        found = _loss_and_gradient(exchanged, x, labels)
        yield _agreement(f"loss exchanged by {backend}, efficient={efficient}, against the plain loss", found, wanted)
    alone = nn.Linear(32, 16).to(device)
    ids = None if device.type == "cpu" else [device]
    wrapped = DistributedDataParallel(copy.deepcopy(alone), device_ids=ids)
    for network in (alone, wrapped):
        DRSLoss()(network(x), labels).backward()
    gradients = [[p.grad for p in network.parameters() if p.grad is not None] for network in (wrapped, alone)]
    yield _agreement("gradients of DistributedDataParallel against one network", *gradients)


def _loss_and_gradient(loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    loss = loss_fn(x, labels)
    return [loss.detach(), *torch.autograd.grad(loss, x)]


def _agreement(name: str, found: list[Tensor], wanted: list[Tensor]) -> Row:
    """Compares tensors. A difference counts relative to the largest value of its tensor, and NaN never agrees."""
    pairs = zip(found, wanted, strict=True)
    differences = [(one - other).abs().max() / other.abs().max() for one, other in pairs]
    difference = float(torch.stack(differences).max())
    return Row(name, f"largest relative difference {difference:.0e}", difference <= 1e-3)


def _require(folder: str) -> None:
    if not (REPOSITORY / folder).is_dir():
        raise InputError(
            f"{REPOSITORY} has no folder {folder}: run this command in a clone of the repository, installed with "
            f"pip install -e '.[reid,benchmark,test]'"
        )
