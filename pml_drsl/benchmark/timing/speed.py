"""``drsl-benchmark speed``: time and peak memory of DRSL and other losses against the number of embeddings.

The floor is the distance matrix alone, forward, and backward from a given gradient. Every loss that uses distances
needs it. A loss's time divided by the floor's time is the price of that loss. The ranking losses of
pytorch-metric-learning run with their own defaults, where they fit in memory. There are 4 embeddings per identity.
Times are medians over rounds in which every loss has one turn. Memory is what one step adds to the peak memory of a
separate process. "DRSL" is ``DRSLoss()``. "DRSL-definition" is the definition in docs/loss.md, with Euclidean distances
and without the bound.

Examples:
  drsl-benchmark speed --sizes 512 --dims 512
  drsl-benchmark speed --json speed.json --csv speed.csv --plot speed.png
  drsl-benchmark speed --losses DRSL SmoothAP --sizes 64 128 256 512
  drsl-benchmark speed --processes 2 --sizes 1024 4096      two processes share the batch: time and bytes moved
  drsl-benchmark speed --step osnet_x1_0 --sizes 16 64      the share of the loss in a network's training step
  drsl-benchmark speed --step osnet_x1_0 --chunk 32 --sizes 64 256 1024
                                                            time and memory of a training step in chunks of 32 images
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from pml_drsl.benchmark.timing import chunked, measure
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
    parser.add_argument(
        "--dims",
        type=int,
        nargs="+",
        help=f"numbers of dimensions ({' '.join(map(str, DIMS))}); with --step the network has its own",
    )
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=list(LOSSES),
        help="losses to measure besides the floor (all); with --chunk it is DRSL",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="seconds for the rounds of one size. A loss whose single step takes longer is measured once. A loss that "
        "takes four times as long is skipped. This does not apply to DRSL and the floor (%(default)s)",
    )
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that one step may take (%(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="number of torch's threads on the CPU (%(default)s)",
    )
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
        help="number of processes that share each batch, each with its own device, compared with one process; "
        "--threads and --memory are divided between them (%(default)s)",
    )
    parser.add_argument(
        "--step", metavar="NETWORK", help="measure the share of the losses in a training step of this torchreid network"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="with --step: compare a training step with DRSL in chunks of at most N images (LargeBatch) with the plain "
        "step, which embeds the whole batch at once. On the CPU, times include the system's work to hand out "
        "memory, which is large for a large plain step",
    )
    parser.add_argument("--json", metavar="FILE", help="write the measurements and a description of the machine here")
    parser.add_argument("--csv", metavar="FILE", help="write the measurements here")
    parser.add_argument("--markdown", metavar="FILE", help="write the times as tables for docs/performance.md here")
    parser.add_argument("--plot", metavar="FILE.png", help="plot time and memory against size (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table for each size at once, and writes the files.

    Returns:
        The exit status 0.

    Raises:
        InputError: if an argument is out of its range, or arguments exclude each other.
    """
    _check(args)
    args.dims, args.losses = args.dims or DIMS, args.losses or list(LOSSES)
    if args.processes > 1 or args.step:
        _write(args, _run_other(args))
        return 0
    plot = speed_report.plotter() if args.plot else None  # A missing matplotlib ends the command before the work.
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
    if args.markdown:
        Path(args.markdown).write_text(speed_report.markdown(rows), encoding="utf-8")
    if plot is not None:
        plot(args.plot, rows)
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, values in (
        ("--sizes", args.sizes), ("--dims", args.dims or DIMS), ("--seconds", [args.seconds]),
        ("--processes", [args.processes]), ("--threads", [args.threads]), ("--memory", [args.memory]),
        ("--chunk", [1 if args.chunk is None else args.chunk]),
    ):  # fmt: skip
        if min(values) <= 0:
            raise InputError(f"{name} must be above 0, got {min(values)}")
    for size in args.sizes:
        if size % PER_IDENTITY or size < 2 * PER_IDENTITY:
            raise InputError(
                f"--sizes {size}: there are {PER_IDENTITY} embeddings of each identity, and at least two identities; "
                f"give multiples of {PER_IDENTITY} from {2 * PER_IDENTITY} on"
            )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: there are 0 CUDA devices; torch {torch.__version__} finds none here")
    if (args.processes > 1) + bool(args.step) + bool(args.plot or args.markdown) > 1:
        raise InputError("--processes, --step, and --plot or --markdown: choose one")
    if args.chunk is not None and not args.step:
        raise InputError(f"--chunk {args.chunk} is for the training step of a network; give --step NETWORK too")
    if args.step and args.dims:
        raise InputError(f"--dims {args.dims[0]}: {args.step} has its own number of dimensions; leave --dims out")
    if args.chunk and args.losses:
        raise InputError(f"--losses {args.losses[0]}: --chunk compares steps with DRSL; leave --losses out")


def _run_other(args: argparse.Namespace) -> Sequence[Any]:
    """Runs ``--processes``, ``--step`` or ``--step`` with ``--chunk``."""
    args.threads = max(1, args.threads // args.processes)
    torch.set_num_threads(args.threads)
    if args.chunk:
        return chunked.run(args.step, args.chunk, args.sizes, args.seconds, args.memory, args.threads, args.device)
    if args.step:
        return speed_step.run(args.step, args.sizes, args.losses, args.seconds, args.threads, args.device)
    points = [(dim, size) for dim in args.dims for size in args.sizes]
    return speed_processes.run(
        points, args.losses, args.processes, args.seconds, args.memory, args.threads, args.device
    )


def _write(args: argparse.Namespace, rows: Sequence[Any]) -> None:
    if args.json:
        speed_report.write_json(args.json, rows, args.device, args.threads)
    if args.csv:
        speed_report.write_csv(args.csv, rows)


def measure_point(size: int, dim: int, args: argparse.Namespace) -> list[Row]:
    """Measures every loss at one size: first memory, in separate processes, then time, in turns."""
    probes, steps = {}, {}
    for name in [FLOOR, *args.losses]:
        unlimited = name in (FLOOR, *OURS)
        limit = None if unlimited else max(10.0, 4 * args.seconds)
        make = partial(measure.make_step, name, dim=dim, device=args.device)
        found = probes[name] = measure.probe(make, size, args.device, args.threads, args.memory, limit)
        if found.seconds is not None and (unlimited or found.seconds <= args.seconds):
            steps[name] = make(size)
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
            # A ratio for each round, because other work on the machine slows both times of a round.
            ratio = median(mine / floor for mine, floor in zip(times[name], times[FLOOR], strict=True))
        elif seconds is not None and FLOOR in times:
            ratio = seconds / median(times[FLOOR])
        rows.append(Row(name, size, dim, seconds, ratio, found.peak, rounds, note))
    return rows
