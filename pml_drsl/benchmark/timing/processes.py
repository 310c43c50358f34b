"""``drsl-benchmark speed --processes``: compares several processes that share a batch with one process.

Each process has its part of the batch and runs ``DistributedLossWrapper``, forward and backward. One process with the
whole batch and all processes together take turns in the same rounds. The bytes are counted in a separate step, from the
tensors that torch.distributed gets.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from pml_drsl.benchmark.timing import measure
from pml_drsl.benchmark.timing import table as speed_report
from pml_drsl.benchmark.timing.measure import LOSSES, OURS, PER_IDENTITY
from pml_drsl.checks import InputError
from pml_drsl.distributed import DistributedLossWrapper
from pml_drsl.evaluation.ranking import share

# How often a collective operation sends its data around the ring of processes.
PASSES = {"allgather_": 1, "allreduce_": 2, "broadcast_": 1}


@dataclass(frozen=True)
class Row:
    """One loss at one batch size, in one process or in several.

    Attributes:
        loss: the loss's name in ``LOSSES``.
        efficient: whether each process computes only the errors of its own queries; False for one process.
        size: number of embeddings of all processes together.
        dim: number of dimensions of an embedding.
        processes: number of processes that share the batch.
        seconds: median time of forward and backward in the slowest process, or None where it was not measured.
        ratio: the time divided by the time of one process, median over the rounds.
        bytes_moved: number of bytes that each process receives in a step. It sends as many. None where the number was
            not measured.
        rounds: number of measured rounds.
        note: the reason why a figure is missing, or "".
    """

    loss: str
    efficient: bool
    size: int
    dim: int
    processes: int
    seconds: float | None
    ratio: float | None
    bytes_moved: int | None
    rounds: int
    note: str = ""


@dataclass(frozen=True)
class Task:
    """What every process measures.

    Attributes:
        points: (dimensions, embeddings, names of the losses that fit in memory).
        missing: the reason why a loss does not fit, by (dimensions, embeddings, name).
        processes: number of processes.
        seconds: time for the rounds of one loss.
        threads: number of torch's threads in each process.
        device: ``"cpu"`` or ``"cuda"``.
    """

    points: Sequence[tuple[int, int, tuple[str, ...]]]
    missing: dict[tuple[int, int, str], str]
    processes: int
    seconds: float
    threads: int
    device: str


class CountedBytes(TorchDispatchMode):
    """Counts the bytes that this process receives in collective operations inside the context.

    It assumes that data moves around a ring of all processes. Of an ``all_gather``, a process receives everything but
    its own part. An ``all_reduce`` moves twice as much. For a ``broadcast``, in which one process receives nothing, the
    count is the mean over the processes.

    Raises:
        NotImplementedError: if another collective operation runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d":
            if name not in PASSES:
                raise NotImplementedError(f"the bytes of {func._schema.name} are not known")
            tensors: list[Any] = torch.utils._pytree.tree_leaves(args[0])
            whole = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
            world_size = dist.get_world_size()
            self.bytes += PASSES[name] * whole * (world_size - 1) // world_size
        return func(*args, **kwargs or {})


def run(
    points: Sequence[tuple[int, int]],
    losses: Sequence[str],
    processes: int,
    seconds: float,
    memory: float,
    threads: int,
    device: str,
) -> list[Row]:
    """Measures in separate processes, and prints a table for each point.

    Args:
        points: (dimensions, embeddings) of each measurement.
        losses: names of losses in ``LOSSES``.
        processes: number of processes that share the batch.
        seconds: time for the rounds of one loss.
        memory: GiB that all processes together may take.
        threads: number of torch's threads in each process.
        device: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL).

    Raises:
        InputError: if there are more processes than CUDA devices, or more processes than embeddings.
    """
    if device == "cuda" and processes > torch.cuda.device_count():
        raise InputError(f"--processes {processes}: there are {torch.cuda.device_count()} CUDA devices")
    fewest = min(size for _, size in points)
    if processes > fewest:
        raise InputError(f"--processes {processes}: more than the {fewest} embeddings of --sizes; give fewer")
    print(f"{speed_report.machine(device, threads)}; in each process")
    missing = {}
    for dim, size in tqdm(points, desc="what fits", unit="size"):
        for name in losses:
            limit = None if name in OURS else max(10.0, 4 * seconds)
            make = partial(measure.make_step, name, dim=dim, device=device)
            found = measure.probe(make, size, device, threads, memory / processes, limit)
            if found.failure:
                missing[dim, size, name] = found.failure
    fitting = [(dim, size, tuple(name for name in losses if (dim, size, name) not in missing)) for dim, size in points]
    with tempfile.TemporaryDirectory() as folder:
        task = Task(fitting, missing, processes, seconds, threads, device)
        spawn(_work, (task, folder), nprocs=processes)
        rows: list[Row] = torch.load(Path(folder, "rows"), weights_only=False)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows of one batch size as text."""
    lines = [
        f"\n{rows[0].size} embeddings of {rows[0].dim} dimensions",
        f"  {'':22}{'processes':>10}{'time':>12}{'/ one':>10}{'moved':>12}",
    ]
    for row in rows:
        name = f"{row.loss}, efficient" if row.efficient else row.loss
        time, ratio = speed_report.time_text(row.seconds), speed_report.ratio_text(row.ratio)
        moved = speed_report.bytes_text(row.bytes_moved)
        lines.append(f"  {name:22}{row.processes:>10}{time:>12}{ratio:>10}{moved:>12}  {row.note}".rstrip())
    return "\n".join(lines)


def _work(rank: int, task: Task, folder: str) -> None:
    """Measures all points in one process; the first process prints the tables and saves the rows."""
    torch.set_num_threads(task.threads)
    device, backend = task.device, "gloo"
    options: dict[str, Any] = {}
    if device == "cuda":
        device, backend = f"cuda:{rank}", "nccl"
        torch.cuda.set_device(device)
        options["device_id"] = torch.device(device)
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=task.processes, **options)
    rows: list[Row] = []
    for dim, size, losses in tqdm(task.points, desc="speed", unit="size", disable=rank > 0):
        of_point = [
            Row(name, False, size, dim, task.processes, None, None, None, 0, why)
            for (*point, name), why in task.missing.items()
            if point == [dim, size]
        ]
        for name in losses:
            of_point += _measure(name, size, dim, task.seconds, device)
        if rank == 0:
            tqdm.write(table(of_point))
        rows += of_point
    if rank == 0:
        torch.save(rows, Path(folder, "rows"))
    dist.destroy_process_group()


def _measure(name: str, size: int, dim: int, seconds: float, device: str) -> list[Row]:
    """Measures one loss in one process and in all processes."""
    generator = torch.Generator().manual_seed(0)
    x, labels = (
        torch.randn(size, dim, generator=generator).to(device),
        torch.arange(size, device=device) // PER_IDENTITY,
    )
    mine = share(size, dist.group.WORLD)  # type: ignore[arg-type]
    own = x[mine].clone().requires_grad_()
    alone = x.requires_grad_() if dist.get_rank() == 0 else None
    steps: dict[bool | None, Callable[[], None]] = {
        efficient: partial(_step, DistributedLossWrapper(LOSSES[name](), efficient), own, labels[mine])
        for efficient in ([True, False] if name in OURS else [False])
    }
    steps[None] = partial(_step, LOSSES[name](), alone, labels)
    moved: dict[bool | None, int] = {None: 0}
    for efficient, step in steps.items():
        if efficient is not None:
            with CountedBytes() as counted:
                step()
            moved[efficient] = counted.bytes
    times: dict[bool | None, list[float]] = {way: [] for way in steps}
    spent = 0.0
    while len(times[None]) < measure.FEWEST_ROUNDS or spent < seconds:
        for way, step in steps.items():
            step()
            dist.barrier()
            # Every process knows the time of the slowest process, so that all processes make the same number of rounds.
            took = torch.tensor(measure.seconds_of(step, device.partition(":")[0]), device=device, dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            times[way].append(took.item())
            spent += 2 * took.item()
    rounds = len(times[None])
    return [
        Row(
            name,
            bool(way),
            size,
            dim,
            1 if way is None else dist.get_world_size(),
            median(times[way]),
            median(several / one for several, one in zip(times[way], times[None], strict=True)),
            moved[way],
            rounds,
        )
        for way in [None, *(way for way in steps if way is not None)]
    ]


def _step(loss_fn: torch.nn.Module, x: torch.Tensor | None, labels: torch.Tensor) -> None:
    """Runs forward and backward, or does nothing in a process without embeddings ``x``."""
    if x is not None:
        torch.autograd.grad(loss_fn(x, labels), x)
