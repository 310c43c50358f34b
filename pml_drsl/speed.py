"""drsl-benchmark speed: time and peak memory of DRSL and of losses of pytorch-metric-learning.

The measure is the distance matrix of LpDistance alone: forward, and backward from a given gradient. A loss's time
divided by the matrix's time is the price of the loss, on any machine; a loss that computes cosines can be below 1.
There are 4 embeddings of each identity, in float32, and each loss has its own defaults. Times are medians over rounds
in which every loss has one turn, because other work on the machine slows down all losses of a round. Memory is what one
step adds to the process.

With --evaluation, the retrieval scores of random features are measured instead, beside the distance matrix that they
need: 3,368 queries and 15,913 gallery images, the size of Market-1501 without its junk images.

Examples:
  drsl-benchmark speed
  drsl-benchmark speed --sizes 1024 --dims 512 --losses DRSL SupCon --csv speed.csv
  drsl-benchmark speed --evaluation --dims 512
  drsl-benchmark speed --device cuda
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pml_drsl.checks import InputError
from pml_drsl.console import check_outputs, guarded, write_text

if TYPE_CHECKING:
    import pandas as pd

# torch and pandas are imported after the arguments are read, so that --help is fast.

FLOOR, EVALUATION = "distance matrix", "evaluation"
LOSSES = ("DRSL", "SupCon", "MultiSimilarity", "Circle", "FastAP", "TripletMargin", "SmoothAP")
PER_IDENTITY, FEWEST_ROUNDS = 4, 3
QUERIES, GALLERY, IDENTITIES, CAMERAS = 3368, 15913, 750, 6

Step = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status, which :func:`pml_drsl.console.guarded` explains."""
    parser = argparse.ArgumentParser(
        "drsl-benchmark speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def option(name: str, default: Any, about: str, **kwargs: Any) -> None:
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(name, default=default, help=f"{about}; default: {shown}", **kwargs)

    option("--sizes", [256, 1024, 4096], "numbers of embeddings, multiples of 4", type=int, nargs="+", metavar="N")
    option("--dims", [512, 2048], "numbers of dimensions", type=int, nargs="+", metavar="D")
    option("--losses", list(LOSSES), "losses to measure", nargs="+", choices=LOSSES, metavar="NAME")
    option("--seconds", 5.0, "seconds for the rounds of one size, at least three rounds", type=float)
    option("--memory", 6.0, "GiB that one step may take; a loss that needs more is left out", type=float)
    option("--threads", 1, "number of torch's threads on the CPU", type=int)
    option("--device", "cpu", "where to compute", choices=["cpu", "cuda"])
    parser.add_argument("--evaluation", action="store_true", help="measure the evaluation in place of the losses")
    parser.add_argument("--csv", metavar="FILE", help="write one line for each loss and size here")
    args = parser.parse_args(arguments)
    return guarded("drsl-benchmark speed", lambda: run(args), [args.csv], extra="benchmark")


def run(args: argparse.Namespace) -> None:
    """Measures every loss at every size, prints the report and writes it. An InputError if an option is out of range.

    A row of the file has ``dim``, ``size``, ``loss``, ``seconds`` (median), ``ratio`` (to the distance matrix, median
    over the rounds), ``peak_mib`` and ``rounds``. A loss that does not fit in memory has 0 rounds, and NaN for its
    figures. ``peak_mib`` is NaN too where the system does not say."""
    import pandas as pd
    import torch
    from tqdm import tqdm

    _check(args)
    device: str = args.device
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, threads: {args.threads}"
    print(f"torch {torch.__version__}, {where}, float32")
    tables = list[pd.DataFrame]()
    make, sizes, names = make_step, args.sizes, args.losses
    if args.evaluation:
        make, sizes, names = make_search, [GALLERY], [EVALUATION]
    for dim, size in tqdm([*product(args.dims, sizes)], unit="size", disable=None):
        torch.manual_seed(0)
        steps = {name: make(name, size, dim, device) for name in (FLOOR, *names)}
        peaks = {name: peak_mib(step, args.memory, device) for name, step in steps.items()}
        times = take_turns({name: steps[name] for name in steps if peaks[name] is not None}, args.seconds, device)
        tables.append(summarize(times, peaks).assign(dim=dim, size=size))
    table = pd.concat(tables)[["dim", "size", "loss", "seconds", "ratio", "peak_mib", "rounds"]]
    if args.csv:
        write_text(args.csv, table.to_csv(index=False))
    print(report(table))


def make_step(name: str, size: int, dim: int, device: str) -> Step:
    """Forward and backward of one of ``LOSSES``, or of the distance matrix alone (``FLOOR``), with ``size`` images."""
    import torch
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.distances import LpDistance

    from pml_drsl.losses import DRSLoss

    x = torch.randn(size, dim, device=device, requires_grad=True)
    if name == FLOOR:
        distance, gradient = LpDistance(), torch.randn(size, size, device=device)
        return lambda: torch.autograd.grad(distance(x), x, gradient)
    loss_fn = DRSLoss() if name == "DRSL" else getattr(losses, f"{name}Loss")()
    labels = torch.arange(size, device=device) // PER_IDENTITY
    return lambda: torch.autograd.grad(loss_fn(x, labels), x)


def make_search(name: str, size: int, dim: int, device: str) -> Step:
    """The evaluation of ``size`` random gallery features around the centers of their identities, which finds some of
    the matches (mAP is about 25 %), or its distances alone (``FLOOR``)."""
    import torch

    from pml_drsl.evaluation.distances import rows_per_chunk
    from pml_drsl.evaluation.scores import FeatureDistances, evaluate

    centers, spread = torch.randn(IDENTITIES, dim), (dim / 2) ** 0.25 / 2.5**0.5
    sides: list[tuple[torch.Tensor, ...]] = []
    for count in (QUERIES, size):
        ids = torch.randint(IDENTITIES, (count,))
        features = torch.randn(count, dim).mul_(spread).add_(centers[ids]).to(device)
        sides.append((features, ids, torch.randint(CAMERAS, (count,))))
    if name == EVALUATION:
        return lambda: evaluate(*(part for parts in zip(*sides, strict=True) for part in parts))
    distances, step = FeatureDistances(sides[0][0], sides[1][0]), rows_per_chunk(size)

    def floor() -> None:  # Every chunk is dropped before the next, as in the evaluation.
        for start in range(0, QUERIES, step):
            distances.rows(start, min(start + step, QUERIES))

    return floor


def take_turns(steps: Mapping[str, Step], seconds: float, device: str) -> dict[str, list[float]]:
    """The times of each step in seconds. The steps take turns for about ``seconds``, and for at least three rounds."""
    import torch
    from torch.utils import benchmark

    options: dict[str, Any] = {"num_threads": torch.get_num_threads()}
    if device == "cpu" and torch.get_num_threads() == 1:  # The processor's time leaves out that of other programs.
        options["timer"] = time.process_time
    timers = {name: benchmark.Timer("step()", globals={"step": step}, **options) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < FEWEST_ROUNDS or time.perf_counter() < end:
        for name, timer in timers.items():  # ``timeit`` makes calls before the one that it measures.
            times[name].append(timer.timeit(1).median)
        rounds += 1
    return times


def summarize(times: Mapping[str, Sequence[float]], peaks: Mapping[str, float | None]) -> pd.DataFrame:
    """The rows of one size. The ratio is the median of the rounds' ratios, which other work on the machine spares."""
    import pandas as pd

    rounds = pd.DataFrame(times, columns=[*peaks], dtype=float)
    ratios = rounds.div(rounds[FLOOR], axis=0)
    figures = {"seconds": rounds.median(), "ratio": ratios.median(), "peak_mib": pd.Series(peaks, dtype=float)}
    return pd.DataFrame(figures | {"rounds": rounds.count()}).rename_axis("loss").reset_index()


def peak_mib(step: Step, gib: float, device: str) -> float | None:
    """The memory that a step adds, in MiB; None if it takes more than ``gib``; NaN where the system does not say."""
    import torch

    from pml_drsl.machine import peak_process_bytes

    on_cuda = device == "cuda"
    try:
        with _limited(gib, device):
            step()  # Libraries allocate memory at their first use.
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if on_cuda else peak_process_bytes(reset=True)
            step()
            after = torch.cuda.max_memory_allocated() if on_cuda else peak_process_bytes()
    except (RuntimeError, MemoryError) as error:
        if "alloc" not in str(error) and "memory" not in str(error):
            raise
        return None
    return float("nan") if before is None or after is None else (after - before) / 2**20


@contextlib.contextmanager
def _limited(gib: float, device: str) -> Iterator[None]:
    """Lets allocations fail that need more than ``gib`` beyond the memory in use. Not all systems have such a limit."""
    import torch

    limit, statm = int(gib * 2**30), Path("/proc/self/statm")
    with contextlib.ExitStack() as stack:
        if device == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
            stack.callback(torch.cuda.set_per_process_memory_fraction, 1.0)
        elif statm.exists():
            import resource

            used = int(statm.read_text().split()[0]) * resource.getpagesize()
            before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (used + limit, before[1]))
            stack.callback(resource.setrlimit, resource.RLIMIT_AS, before)
        yield


def report(rows: pd.DataFrame) -> str:
    """Tables in Markdown: times divided by the distance matrix's, times in milliseconds, and memory."""
    parts = []
    for dim, of_dim in rows.groupby("dim"):
        for values, digits, title in (
            (of_dim["ratio"], 2, "time / time of the distance matrix alone"),
            (of_dim["seconds"] * 1e3, 1, "time in milliseconds"),
            (of_dim["peak_mib"], 1, "memory of a step in MiB"),
        ):
            shown = values.map(f"{{:,.{digits}f}}".format).where(values.notna(), "not measured")
            shown = shown.where(of_dim["rounds"] > 0, "does not fit")
            table = of_dim.assign(shown=shown).pivot(index="size", columns="loss", values="shown")
            table = table[of_dim["loss"].unique()].rename("{:,}".format)
            text = table.to_markdown(disable_numparse=True, stralign="right")
            parts.append(f"{dim:,} dimensions, {title}:\n\n{text}\n")
    return "\n".join(parts)


def _check(args: argparse.Namespace) -> None:
    import torch

    least = {"sizes": min(args.sizes), "dims": min(args.dims)}
    for name, value in {**least, "seconds": args.seconds, "memory": args.memory, "threads": args.threads}.items():
        if value <= 0:
            raise InputError(f"--{name} {value}: give a number above 0")
    for size in args.sizes:
        if size % PER_IDENTITY or size < 2 * PER_IDENTITY:
            raise InputError(f"--sizes {size}: give multiples of {PER_IDENTITY} from {2 * PER_IDENTITY} on")
    check_outputs({"--csv": args.csv}, ())
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: torch {torch.__version__} finds no CUDA device here")
