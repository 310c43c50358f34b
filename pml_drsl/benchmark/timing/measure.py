"""Measures the time and the peak memory of one step: of a loss, forward and backward, or of a network's training.

Memory is measured in a separate process. That process also finds out whether the step fits in memory, so that a step
that does not fit stops nothing else. Times of different steps are measured in turns in one process, so that other work
on the machine changes their ratios little.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.distances import LpDistance

from pml_drsl.losses import DRSLoss
from pml_drsl.machine import peak_process_bytes, reset_peak_process_bytes

FLOOR = "floor"
OURS = ("DRSL", "DRSL-definition")
LOSSES: dict[str, Callable[[], torch.nn.Module]] = {
    "DRSL": DRSLoss,
    "DRSL-definition": lambda: DRSLoss(temperature=0.01, sort_weight=0.3, bound_power=None, distance=LpDistance()),
    "SmoothAP": pml.SmoothAPLoss,
    "FastAP": pml.FastAPLoss,
    "TripletMargin": pml.TripletMarginLoss,
    "MultiSimilarity": pml.MultiSimilarityLoss,
    "Circle": pml.CircleLoss,
    "SupCon": pml.SupConLoss,
}
PER_IDENTITY = 4
FEWEST_ROUNDS = 3
WARM_UP_SIZE = 2 * PER_IDENTITY
GIB = 2**30

Key = TypeVar("Key")


@dataclass(frozen=True)
class Probe:
    """One step in a separate process.

    Attributes:
        seconds: time of the step, or None where the step failed.
        peak: bytes of memory that the step added, or None where they are unknown.
        failure: the reason why the step failed, or None.
    """

    seconds: float | None = None
    peak: int | None = None
    failure: str | None = None


def make_step(name: str, size: int, dim: int, device: str) -> Callable[[], None]:
    """A function that runs forward and backward of a loss, or of the floor.

    The floor is the distance matrix alone, with a given gradient for its backward pass.

    Args:
        name: a name in ``LOSSES``, or ``FLOOR``.
        size: number of embeddings, a multiple of 4.
        dim: number of dimensions.
        device: ``"cpu"`` or ``"cuda"``.
    """
    x = torch.randn(size, dim, device=device, requires_grad=True)
    if name == FLOOR:
        distance, gradient = LpDistance(), torch.randn(size, size, device=device)
        return lambda: _discard(torch.autograd.grad(distance(x), x, gradient))
    return step_of(LOSSES[name](), x)


def step_of(loss_fn: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """A function that runs forward and backward of a loss on embeddings of shape (N, D)."""
    x.requires_grad_()
    labels = torch.arange(len(x), device=x.device) // PER_IDENTITY
    return lambda: _discard(torch.autograd.grad(loss_fn(x, labels), x))


def _discard(gradients: tuple[torch.Tensor, ...]) -> None:
    pass


def seconds_of(step: Callable[[], None], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call by a clock. On a GPU this includes waiting until the GPU has finished."""
    _synchronize(device)
    start = clock()
    step()
    _synchronize(device)
    return clock() - start


def clock_for(device: str) -> Callable[[], float]:
    """The clock for steps on a device: processor time with one thread on the CPU, and elapsed time otherwise.

    On a quiet machine both are equal. On a busy machine, processor time leaves out the time of other programs.
    """
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def take_turns(steps: Mapping[Key, Callable[[], None]], seconds: float, device: str) -> dict[Key, list[float]]:
    """The times of each step, in seconds. The steps take turns for about ``seconds``, and for at least three rounds.

    Each turn makes two calls and measures the second one. The first call finds the caches filled by another step. The
    clock is that of ``clock_for``.
    """
    clock = clock_for(device)
    times: dict[Key, list[float]] = {name: [] for name in steps}
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < FEWEST_ROUNDS or time.perf_counter() < end:
        for name, step in steps.items():
            step()
            times[name].append(seconds_of(step, device, clock))
        rounds += 1
    return times


def probe(
    make: Callable[[int], Callable[[], None]],
    size: int,
    device: str,
    threads: int,
    memory: float,
    time_limit: float | None,
) -> Probe:
    """Runs one step in a separate process, after a smaller step as a warm-up.

    Args:
        make: a function that makes the step for a batch size. It must be possible to pickle the function.
        size: the batch size.
        device: ``"cpu"`` or ``"cuda"``.
        threads: number of torch's threads in the process.
        memory: GiB that the step may take.
        time_limit: seconds that the process may take, or None for no limit.
    """
    context = clean_processes()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_probe, args=(there, make, size, device, threads, memory))
    process.start()
    there.close()
    try:
        if not here.poll(time_limit):
            return Probe(failure=f"skipped: over {time_limit:.0f} s")
        found: Probe = here.recv()
        return found
    except EOFError:  # Most likely the system killed the process because memory was full.
        return Probe(failure=f"does not fit in {memory:g} GiB")
    finally:
        process.kill()
        process.join()


def clean_processes(*modules: str) -> Any:
    """A multiprocessing context whose new processes start fast, because torch and ``modules`` are imported already.

    Args:
        *modules: names of modules that every process imports.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    # The server only imports torch. It never uses CUDA, so its child processes can.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *modules])
    return context


def _probe(
    connection: Connection,
    make: Callable[[int], Callable[[], None]],
    size: int,
    device: str,
    threads: int,
    memory: float,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    make(WARM_UP_SIZE)()  # Libraries allocate memory at their first use.
    step = make(size)
    _limit_memory(memory, device)
    times: list[float] = []

    def timed() -> None:
        times.append(seconds_of(step, device, clock_for(device)))

    try:
        peak = peak_bytes(timed, device)
    except (RuntimeError, MemoryError) as error:
        if "alloc" not in str(error) and "memory" not in str(error):
            raise
        connection.send(Probe(failure=f"does not fit in {memory:g} GiB"))
        return
    connection.send(Probe(times[0], peak))


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """The memory that a step adds, or None where the system does not say.

    On the CPU this is the highest memory use of this process during the step, less its memory use before the step. On
    other systems than Linux, a process that used more memory at an earlier time gives too small a figure.
    """
    if device != "cpu":
        return cuda_peak_bytes(step)
    reset_peak_process_bytes()
    before = peak_process_bytes()
    step()
    after = peak_process_bytes()
    return None if before is None or after is None else after - before


def cuda_peak_bytes(step: Callable[[], object]) -> int:
    """The largest amount of memory that the CUDA tensors of a step take at once, beyond the memory in use before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _limit_memory(gib: float, device: str) -> None:
    """Lets an allocation fail when this process needs more than ``gib`` above its current memory.

    Some systems have no such limit. There nothing changes.
    """
    if device != "cpu":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, gib * GIB / torch.cuda.get_device_properties(device).total_memory)
        )
        return
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gib * GIB), resource.RLIM_INFINITY))


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
