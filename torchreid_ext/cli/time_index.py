"""Measures the index of drsl-search on random features: the time to make, search and change it, memory and recall.

Random features are the hard case: they have no structure that an index could use. Each query is a feature of the index
with noise, so that it has one near neighbour.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from pml_drsl.checks import InputError
from pml_drsl.machine import peak_process_bytes
from torchreid_ext.cli import console
from torchreid_ext.search.index import EXACT_BELOW, NEAREST, FeatureIndex

T = TypeVar("T")
GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for bad input, which stderr explains, or 130."""
    args = _parser().parse_args(arguments)
    return console.guarded("time_index", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Prints a line for each step.

    Raises:
        InputError: for numbers out of their range.
    """
    if min(args.entries, args.dim, args.queries, args.threads) < 1:
        raise InputError("--entries, --dim, --queries and --threads must be 1 or more")
    torch.set_num_threads(args.threads)
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(args.entries, args.dim, generator=generator)
    queries = features[: args.queries] + 0.3 * torch.randn(args.queries, args.dim, generator=generator)
    index = FeatureIndex(args.dim, "euclidean", args.exact_below)
    before = peak_process_bytes()
    _timed("make and measure", lambda: index.add(features, np.arange(args.entries)))
    print(f"the index is {'exact' if index.recall is None else 'by lists: the ' + str(index.recall)}")
    numbers, _ = _timed(f"search {args.queries} queries", lambda: index.search(queries, NEAREST))
    exact = faiss.IndexFlatL2(args.dim)
    exact.add(features.numpy())
    _, truth = _timed("the same exactly", lambda: exact.search(queries.numpy(), NEAREST))
    shared = [len(np.intersect1d(mine, theirs)) for mine, theirs in zip(numbers, truth, strict=True)]
    print(f"recall of the nearest {NEAREST}: {np.sum(shared) / truth.size:.1%}")
    print(f"recall of the nearest: {np.mean(numbers[:, 0] == truth[:, 0]):.1%}")
    _timed("remove 1,000", lambda: index.remove(np.arange(min(1000, args.entries))))
    data = _timed("write to memory", index.to_bytes)
    print(f"size {len(data) / GIB:.2f} GiB; features {features.numel() * 4 / GIB:.2f} GiB")
    if before is not None:
        peak = peak_process_bytes() or before
        print(f"peak memory of the process {peak / GIB:.2f} GiB, {before / GIB:.2f} GiB before the index")


def _timed(what: str, work: Callable[[], T]) -> T:
    started = time.perf_counter()
    result = work()
    print(f"{what}: {time.perf_counter() - started:.2f} s", flush=True)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m torchreid_ext.cli.time_index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--entries", type=int, default=1_000_000, metavar="M", help="features (%(default)s)")
    parser.add_argument("--dim", type=int, default=128, metavar="D", help="dimensions of a feature (%(default)s)")
    parser.add_argument("--queries", type=int, default=200, metavar="Q", help="queries (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of faiss (%(default)s)")
    parser.add_argument(
        "--exact-below", type=int, default=EXACT_BELOW, metavar="M", help="use lists from this many on (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
