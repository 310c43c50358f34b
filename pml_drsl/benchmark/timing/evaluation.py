"""``drsl-benchmark evaluation``: time, memory and agreement of the re-ID evaluation, compared with torchreid.

Both implementations get the same features and compute mAP, CMC and rank-1. Both times include the distances. Each
implementation runs in a separate process. Memory is what the evaluation adds to the peak memory of that process after
the features exist. torchreid holds several matrices of all queries by all gallery images. If they would not fit in
--memory, torchreid is left out.

Examples:
  drsl-benchmark evaluation                      the size of Market-1501, compared with torchreid (a few minutes)
  drsl-benchmark evaluation --msmt --json m.json the size of MSMT17: memory
  drsl-benchmark evaluation --rerank             with k-reciprocal re-ranking
  drsl-benchmark evaluation --index ivf hnsw --queries 500 --gallery 200000 --dim 128 --identities 10000
                                                 approximate search of faiss, compared with its exact search
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pml_drsl.benchmark.timing import search as approximate
from pml_drsl.benchmark.timing.measure import peak_bytes
from pml_drsl.checks import InputError
from pml_drsl.evaluation.scores import evaluate

GIB = 2**30
# Peak memory of torchreid's evaluation in bytes for each pair of a query and a gallery image: distances in float32,
# argsort and gathered identities in int64, matches in int32 and their mask.
HOST_BYTES_PER_PAIR = 26


@dataclass(frozen=True)
class Task:
    """A search to evaluate.

    Attributes:
        queries: number of queries.
        gallery: number of gallery images.
        dim: number of dimensions of the float32 features.
        identities: number of identities.
        cameras: number of cameras.
        rerank: whether to re-rank first.
        threads: number of torch's threads.
        separation: difference between the mean squared distance to another identity and the mean squared distance to
            a match, in standard deviations. A larger separation makes the search easier.
    """

    queries: int
    gallery: int
    dim: int
    identities: int
    cameras: int
    rerank: bool
    threads: int
    separation: float = 2.5


@dataclass(frozen=True)
class Measurement:
    """The evaluation by one implementation.

    Attributes:
        implementation: ``"pml_drsl"`` or ``"torchreid"``.
        seconds: median time over the rounds.
        peak_bytes: memory that the evaluation adds to the features, or None where the system does not say (Windows).
        mAP: mean average precision, in (0, 1].
        rank_1: rank-1, in [0, 1].
    """

    implementation: str
    seconds: float
    peak_bytes: int | None
    mAP: float
    rank_1: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, default=3368, help="(%(default)s)")
    parser.add_argument("--gallery", type=int, default=15913, help="(%(default)s)")
    parser.add_argument("--dim", type=int, default=2048, help="number of dimensions of the features (%(default)s)")
    parser.add_argument("--identities", type=int, default=750, help="(%(default)s)")
    parser.add_argument("--cameras", type=int, default=6, help="(%(default)s)")
    parser.add_argument(
        "--separation",
        type=float,
        default=2.5,
        help="how far identities are apart; a larger value gives a higher mAP (%(default)s)",
    )
    parser.add_argument(
        "--msmt", action="store_true", help="the size of MSMT17: 11659 x 82161 x 512, 3060 identities, 15 cameras"
    )
    parser.add_argument("--rerank", action="store_true", help="re-rank first, without torchreid")
    parser.add_argument(
        "--rounds", type=int, default=3, help="number of evaluations by pml_drsl; torchreid makes one (%(default)s)"
    )
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that torchreid may use (%(default)s)")
    parser.add_argument("--no-host", action="store_true", help="do not run torchreid")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="number of torch's threads (%(default)s)"
    )
    parser.add_argument(
        "--index",
        nargs="+",
        choices=["ivf", "hnsw"],
        help="compare approximate search of faiss with its exact search instead",
    )
    parser.add_argument(
        "--top", type=int, default=100, help="number of gallery images that --index finds for each query (%(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the measurements here")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes the results.

    Returns:
        The exit status 0.

    Raises:
        InputError: if a size is out of its range, or ``--index`` and ``--rerank`` are given together.
    """
    task = Task(args.queries, args.gallery, args.dim, args.identities, args.cameras, args.rerank, args.threads)
    task = replace(task, separation=args.separation)
    if args.msmt:
        task = replace(task, queries=11659, gallery=82161, dim=512, identities=3060, cameras=15)
    _check(task, args)
    print(
        f"{task.queries} queries x {task.gallery} gallery images x {task.dim} dimensions, {task.identities} "
        f"identities, {task.cameras} cameras, {task.threads} threads{', re-ranked' if task.rerank else ''}"
    )
    if args.index:
        rows = approximate.run(make_search(task), args.index, min(args.top, task.gallery), args.threads)
        report: dict[str, Any] = {"task": asdict(task), "measurements": [asdict(row) for row in rows]}
    else:
        report = _compare(task, args)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
    return 0


def _check(task: Task, args: argparse.Namespace) -> None:
    sizes = {name: value for name, value in asdict(task).items() if name not in ("rerank", "separation")}
    for name, value in (sizes | {"rounds": args.rounds, "top": args.top}).items():
        if value < 1:
            raise InputError(f"--{name} {value}: give at least 1")
    if task.separation <= 0:
        raise InputError(f"--separation {task.separation}: give more than 0")
    if args.index and args.rerank:
        raise InputError("--rerank needs all distances: leave out --rerank or --index")


def _compare(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    """Measures ``pml_drsl``, and torchreid where it can run; prints a table and returns the results for JSON."""
    print(f"{'':12}{'seconds':>10}{'GiB':>10}{'mAP':>10}{'rank-1':>10}")
    found = [_in_own_process("pml_drsl", task, args.rounds)]
    print(_row(found[0]), flush=True)
    report: dict[str, Any] = {"task": asdict(task), "left_out": _why_no_host(task, args)}
    if report["left_out"] is None:
        found.append(_in_own_process("torchreid", task, 1))
        report["ratio"] = found[1].seconds / found[0].seconds
        print(_row(found[1]))
        difference = abs(found[0].mAP - found[1].mAP)
        print(f"pml_drsl is {report['ratio']:.1f} times as fast; mAP differs by {difference:.1e}")
    else:
        print(f"torchreid is left out: {report['left_out']}")
    return report | {"measurements": [asdict(one) for one in found]}


def measure(implementation: str, task: Task, rounds: int) -> Measurement:
    """Evaluates ``rounds`` times. Memory is measured only if this process has not used more memory before."""
    torch.set_num_threads(task.threads)
    function = {"pml_drsl": _ours, "torchreid": _host}[implementation]
    # The first call imports and allocates.
    function(make_search(replace(task, queries=30, gallery=90, identities=2)), task.rerank)
    search = make_search(task)
    seconds: list[float] = []
    scores = (0.0, 0.0)

    def rounds_in_turn() -> None:
        nonlocal scores
        for _ in range(rounds):
            start = time.perf_counter()
            scores = function(search, task.rerank)
            seconds.append(time.perf_counter() - start)

    peak = peak_bytes(rounds_in_turn, "cpu")
    return Measurement(implementation, median(seconds), peak, *scores)


def make_search(task: Task) -> dict[str, Tensor]:
    """Random features around the centers of their identities. A search finds some of the matches, but not all."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(task.identities, task.dim, generator=generator)
    # This spread gives the separation that ``Task`` describes.
    spread = ((task.dim / 2) ** 0.5 / task.separation) ** 0.5
    search: dict[str, Tensor] = {}
    for side, size in (("query", task.queries), ("gallery", task.gallery)):
        ids = torch.randint(0, task.identities, (size,), generator=generator)
        features = torch.randn(size, task.dim, generator=generator).mul_(spread)
        for start in range(0, size, 1024):  # A matrix of all centers would raise the peak of memory.
            features[start : start + 1024] += centers[ids[start : start + 1024]]
        cams = torch.randint(0, task.cameras, (size,), generator=generator)
        search |= {side: features, f"{side}_ids": ids, f"{side}_cams": cams}
    return search


def _ours(search: dict[str, Any], rerank: bool) -> tuple[float, float]:
    result = evaluate(**search, rerank=rerank)
    return result.mAP, result.rank(1)


def _host(search: dict[str, Any], rerank: bool) -> tuple[float, float]:
    metrics = importlib.import_module("torchreid").metrics  # Only this function needs torchreid.
    distances = metrics.compute_distance_matrix(search["query"], search["gallery"]).numpy()
    labels = [search[name].numpy() for name in ("query_ids", "gallery_ids", "query_cams", "gallery_cams")]
    cmc, mean_ap = metrics.evaluate_rank(distances, *labels, use_cython=False)
    return float(mean_ap), float(cmc[0])


def _why_no_host(task: Task, args: argparse.Namespace) -> str | None:
    gib = HOST_BYTES_PER_PAIR * task.queries * task.gallery / GIB
    if args.no_host:
        return "--no-host is given"
    if task.rerank:
        return "it is not compared with re-ranking"
    if find_spec("torchreid") is None:
        return "it is not installed (pip install 'pml-drsl[reid]')"
    return f"it would take about {gib:.0f} GiB, over --memory {args.memory:g}" if gib > args.memory else None


def _in_own_process(implementation: str, task: Task, rounds: int) -> Measurement:
    context = multiprocessing.get_context("spawn")  # A forked process would inherit the peak of memory.
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, implementation, task, rounds).result()


def _row(one: Measurement) -> str:
    gib = "?" if one.peak_bytes is None else f"{one.peak_bytes / GIB:.2f}"
    return f"{one.implementation:12}{one.seconds:>10.2f}{gib:>10}{one.mAP:>10.2%}{one.rank_1:>10.2%}"
