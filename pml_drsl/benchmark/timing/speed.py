"""Time and peak memory of DRSL, forward and backward, against the number of embeddings (4 per identity).

The floor is what any loss of distances must pay: the matrix of distances alone, forward, and backward from a given
gradient. DRSL / floor is the price of DRSL. pytorch-metric-learning's ranking losses run beside it, with their own
defaults, where they fit. Times are medians of rounds in which every loss has one turn; memory is what one step adds
to the peak of a process of its own.

Examples:
  drsl-benchmark speed --sizes 512 --dims 512
  drsl-benchmark speed --json speed.json --csv speed.csv --plot speed.png
  drsl-benchmark speed --losses DRSL SmoothAP --sizes 64 128 256 512
  drsl-benchmark speed --processes 2 --sizes 1024 4096      the batch shared by two processes: time and bytes moved
  drsl-benchmark speed --step osnet_x1_0 --sizes 16 64      the share of the loss in a network's training step
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from pml_drsl.benchmark.timing import measure
from pml_drsl.benchmark.timing import processes as speed_processes
from pml_drsl.benchmark.timing import step as speed_step
from pml_drsl.benchmark.timing import table as speed_report
from pml_drsl.benchmark.timing.measure import FLOOR, LOSSES, OURS, PER_IDENTITY
from pml_drsl.benchmark.timing.table import Row
from pml_drsl.checks import InputError

SIZES = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
DIMS = [512, 2048]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help="numbers of embeddings, multiples of 4 (%(default)s)"
    )
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help="their dimensions (%(default)s)")
    parser.add_argument(
        "--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES), help="losses, beside the floor (all)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="time for the rounds of one size; a loss whose single step takes longer is timed once, and left out "
        "where it takes four times that, except DRSL and the floor (%(default)s)",
    )
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that one step may take (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, CPU (%(default)s)")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(%(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="above 1: share each batch between so many processes, on one device each, and compare with one; "
        "--threads and --memory are of all together",
    )
    parser.add_argument("--step", metavar="NETWORK", help="the share of the losses in the step of torchreid's NETWORK")
    parser.add_argument("--json", metavar="FILE", help="write the measurements, and the machine they are of, here")
    parser.add_argument("--csv", metavar="FILE", help="write the measurements here")
    parser.add_argument("--plot", metavar="FILE.png", help="plot time and memory against size (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table per size as it goes, and writes the files asked for."""
    for name, values in (
        ("--sizes", args.sizes), ("--dims", args.dims), ("--seconds", [args.seconds]),
        ("--processes", [args.processes]), ("--threads", [args.threads]),
    ):  # fmt: skip
        if min(values) <= 0:
            print(f"{name} must be above 0, got {min(values)}", file=sys.stderr)
            return 2
    for size in args.sizes:
        if size % PER_IDENTITY or size < 2 * PER_IDENTITY:
            print(
                f"--sizes {size}: there are {PER_IDENTITY} embeddings of each identity, and of two at least; give "
                f"multiples of {PER_IDENTITY} from {2 * PER_IDENTITY} on",
                file=sys.stderr,
            )
            return 2
    if args.processes > 1 or args.step:
        return _run_other(args)
    plot = speed_report.plotter() if args.plot else None  # a missing matplotlib is told before the work, not after
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(speed_report.machine(args.device, args.threads))
    rows: list[Row] = []
    points = [(dim, size) for dim in args.dims for size in args.sizes]
    for dim, size in tqdm(points, desc="speed", unit="size", file=sys.stderr):
        of_point = measure_point(size, dim, args)
        tqdm.write(speed_report.table(of_point), file=sys.stdout)
        rows += of_point
    print(speed_report.growth(rows))
    if "SmoothAP" in args.losses:
        print(speed_report.smooth_ap_note())
    _write(args, rows)
    if plot is not None:
        plot(args.plot, rows)
    return 0


def _run_other(args: argparse.Namespace) -> int:
    """``--processes`` and ``--step``."""
    if args.plot or (args.processes > 1 and args.step):
        print("--processes, --step and --plot: choose one", file=sys.stderr)
        return 2
    args.threads = max(1, args.threads // args.processes)
    torch.set_num_threads(args.threads)
    rows: Sequence[Any]
    try:
        if args.step:
            rows = speed_step.run(args.step, args.sizes, args.losses, args.seconds, args.threads, args.device)
        else:
            points = [(dim, size) for dim in args.dims for size in args.sizes]
            rows = speed_processes.run(
                points, args.losses, args.processes, args.seconds, args.memory, args.threads, args.device
            )
    except InputError as error:
        print(f"drsl-benchmark speed: {error}", file=sys.stderr)
        return 2
    _write(args, rows)
    return 0


def _write(args: argparse.Namespace, rows: Sequence[Any]) -> None:
    if args.json:
        speed_report.write_json(args.json, rows, args.device, args.threads)
    if args.csv:
        speed_report.write_csv(args.csv, rows)


def measure_point(size: int, dim: int, args: argparse.Namespace) -> list[Row]:
    """Every loss at one size: memory and fit in processes of their own, then time in turns."""
    probes, steps = {}, {}
    for name in [FLOOR, *args.losses]:
        unlimited = name in (FLOOR, *OURS)
        limit = None if unlimited else max(10.0, 4 * args.seconds)
        found = probes[name] = measure.probe(name, size, dim, args.device, args.threads, args.memory, limit)
        if found.seconds is not None and (unlimited or found.seconds <= args.seconds):
            steps[name] = measure.make_step(name, size, dim, args.device)
    times = measure.take_turns(steps, args.seconds, args.device)
    rows = []
    for name, found in probes.items():
        seconds, ratio, rounds, note = (
            found.seconds,
            None,
            0 if found.failure else 1,
            found.failure or "timed once, cold",
        )
        if name in times:
            seconds, rounds, note = median(times[name]), len(times[name]), ""
            # Round by round, so that what else the machine did in a round is on both sides.
            ratio = median(mine / floor for mine, floor in zip(times[name], times[FLOOR], strict=True))
        elif seconds is not None and FLOOR in times:
            ratio = seconds / median(times[FLOOR])
        rows.append(Row(name, size, dim, seconds, ratio, found.peak, rounds, note))
    return rows
