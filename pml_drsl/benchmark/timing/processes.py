"""``drsl-benchmark speed --processes``: a batch shared by several processes, beside one process that has all of it.

Each process has its share of the batch and calls ``DistributedLossWrapper``, forward and backward. One process and
all of them have their turns in the same rounds. The bytes are counted in a step of their own, from the tensors that
torch.distributed is given there.
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
from pml_drsl.benchmark.timing.measure import LOSSES, PER_IDENTITY
from pml_drsl.checks import InputError
from pml_drsl.distributed import DistributedLossWrapper
from pml_drsl.evaluation.ranking import share

PASSES = {"allgather_": 1, "allreduce_": 2, "broadcast_": 1}  # round the ring


@dataclass(frozen=True)
class Row:
    """One loss at one size, by one process or by several.

    Attributes:
        loss: name.
        efficient: whether each process computes the errors of its own queries alone; False for one process.
        size: number of embeddings of all processes together.
        dim: their dimension.
        processes: that share them.
        seconds: median time of forward and backward, of the slowest process; None where it was not measured.
        ratio: its time over that of one process, median over the rounds.
        bytes_moved: that each process receives in a step, and as many it sends; None where it was not measured.
        rounds: number of times measured.
        note: why something is missing, or "".
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
    """What every process measures; fields as the command's options, ``threads`` of each process."""

    points: Sequence[tuple[int, int, tuple[str, ...]]]  # (dimensions, embeddings, losses that fit)
    missing: dict[tuple[int, int, str], str]
    processes: int
    seconds: float
    threads: int
    device: str


class CountedBytes(TorchDispatchMode):
    """Counts, within, what this process receives in collectives, as a ring of all processes moves it.

    That is all but this process's share of what ``all_gather`` returns, and twice that of what ``all_reduce`` sums; of
    what ``broadcast`` sends, the mean over the processes, one of which receives nothing.

    Raises:
        NotImplementedError: for another collective.
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
    """Measures in processes of its own, which print a table for each of ``points``, (dimensions, embeddings).

    Args:
        memory: GiB that all processes together may take.
        threads: of torch, in each process.
        device: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL).

    Raises:
        InputError: for more processes than CUDA devices, or than embeddings.
    """
    if device == "cuda" and processes > torch.cuda.device_count():
        raise InputError(f"--processes {processes}: there are {torch.cuda.device_count()} CUDA devices")
    fewest = min(size for _, size in points)
    if processes > fewest:
        raise InputError(f"--processes {processes}: more than the {fewest} embeddings of --sizes")
    print(f"{speed_report.machine(device, threads)}; in each process")
    missing = {}
    for dim, size in tqdm(points, desc="what fits", unit="size"):
        for name in losses:
            limit = None if name == "DRSL" else max(10.0, 4 * seconds)
            found = measure.probe(name, size, dim, device, threads, memory / processes, limit)
            if found.failure:
                missing[dim, size, name] = found.failure
    fitting = [(dim, size, tuple(name for name in losses if (dim, size, name) not in missing)) for dim, size in points]
    with tempfile.TemporaryDirectory() as folder:
        task = Task(fitting, missing, processes, seconds, threads, device)
        spawn(_work, (task, folder), nprocs=processes)
        rows: list[Row] = torch.load(Path(folder, "rows"), weights_only=False)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows of one size as text."""
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
    torch.set_num_threads(task.threads)
    device = task.device
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if task.device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=task.processes,
    )
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
    """One process beside all, of one loss."""
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
        for efficient in ([True, False] if name == "DRSL" else [False])
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
            # The slowest counts, and all know it, so that all make as many rounds.
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
    """Forward and backward; nothing where this process only waits for the one that has ``x``."""
    if x is not None:
        torch.autograd.grad(loss_fn(x, labels), x)
