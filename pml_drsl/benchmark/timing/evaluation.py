"""Time, memory and agreement of the re-ID evaluation, beside torchreid's Python path where torchreid is installed.

Both get the same features and give mAP, CMC and rank-1; both times include the distances. Each runs in a process of
its own. Memory is what an evaluation adds to the peak of that process, beyond the features themselves. torchreid
holds several queries x gallery matrices: it is left out where they would not fit in --memory.

Examples:
  drsl-benchmark evaluation                      Market-1501's size, against torchreid (a few minutes)
  drsl-benchmark evaluation --msmt --json m.json MSMT17's size: memory
  drsl-benchmark evaluation --rerank             with k-reciprocal re-ranking
  drsl-benchmark evaluation --index ivf hnsw --queries 500 --gallery 200000 --dim 128 --identities 10000
                                                 faiss's approximate search, against its exact one
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
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
from pml_drsl.evaluation.accuracy import evaluate

GIB = 2**30
# Bytes per pair of a query and a gallery image that torchreid's evaluation takes at its peak: distances in float32,
# argsort and gathered identities in int64, matches in int32 and their mask.
HOST_BYTES_PER_PAIR = 26


@dataclass(frozen=True)
class Task:
    """What to evaluate.

    Attributes:
        queries: number of queries.
        gallery: number of gallery images.
        dim: dimensions of the features, float32.
        identities: number of identities.
        cameras: number of cameras.
        rerank: re-rank first.
        threads: of torch.
        separation: of squared distances, from those to a match to those to another identity, in standard deviations.
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
    """One implementation's evaluation.

    Attributes:
        implementation: ``"pml_drsl"`` or ``"torchreid"``.
        seconds: median over the rounds.
        peak_bytes: memory added to the features; None where the system does not say (Windows).
        mAP: mean average precision.
        rank_1: rank-1.
    """

    implementation: str
    seconds: float
    peak_bytes: int | None
    mAP: float
    rank_1: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, default=3368, help="(%(default)s)")
    parser.add_argument("--gallery", type=int, default=15913, help="(%(default)s)")
    parser.add_argument("--dim", type=int, default=2048, help="dimensions of the features (%(default)s)")
    parser.add_argument("--identities", type=int, default=750, help="(%(default)s)")
    parser.add_argument("--cameras", type=int, default=6, help="(%(default)s)")
    parser.add_argument(
        "--separation", type=float, default=2.5, help="of the identities: the larger, the higher mAP (%(default)s)"
    )
    parser.add_argument(
        "--msmt", action="store_true", help="MSMT17's size: 11659 x 82161 x 512, 3060 identities, 15 cameras"
    )
    parser.add_argument("--rerank", action="store_true", help="re-rank first, for pml_drsl alone")
    parser.add_argument(
        "--rounds", type=int, default=3, help="evaluations by pml_drsl; torchreid has one (%(default)s)"
    )
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that torchreid may take (%(default)s)")
    parser.add_argument("--no-host", action="store_true", help="leave torchreid out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    parser.add_argument(
        "--index", nargs="+", choices=["ivf", "hnsw"], help="faiss's approximate search instead, against its exact one"
    )
    parser.add_argument("--top", type=int, default=100, help="gallery images that --index finds (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the measurements here")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table and writes the file asked for. Returns 0, or 2 for sizes below 1."""
    task = Task(args.queries, args.gallery, args.dim, args.identities, args.cameras, args.rerank, args.threads)
    task = replace(task, separation=args.separation)
    if args.msmt:
        task = replace(task, queries=11659, gallery=82161, dim=512, identities=3060, cameras=15)
    counts = {"rounds": args.rounds, "top": args.top} | {
        name: value for name, value in asdict(task).items() if name != "rerank"
    }
    for name, value in counts.items():
        least = "more than 0" if name == "separation" else "at least 1"
        if value <= 0 or (value < 1 and name != "separation"):
            print(f"drsl-benchmark evaluation: --{name} {value}: give {least}", file=sys.stderr)
            return 2
    if args.index and args.rerank:
        print("drsl-benchmark evaluation: --rerank needs all distances: leave it or --index out", file=sys.stderr)
        return 2
    print(
        f"{task.queries} queries x {task.gallery} gallery images x {task.dim} dimensions, {task.identities} "
        f"identities, {task.cameras} cameras, {task.threads} threads{', re-ranked' if task.rerank else ''}"
    )
    if args.index:
        rows = approximate.run(make_search(task), args.index, min(args.top, task.gallery), args.threads)
        if args.json:
            _write_json(args.json, {"task": asdict(task), "measurements": [asdict(row) for row in rows]})
        return 0
    print(f"{'':12}{'seconds':>10}{'GiB':>10}{'mAP':>10}{'rank-1':>10}")
    found = [_in_own_process("pml_drsl", task, args.rounds)]
    print(_row(found[0]), flush=True)
    obstacle = _why_no_host(task, args)
    if obstacle is None:
        found.append(_in_own_process("torchreid", task, 1))
        print(_row(found[1]))
        ratio = found[1].seconds / found[0].seconds
        print(f"pml_drsl is {ratio:.1f} times as fast; mAP differs by {abs(found[0].mAP - found[1].mAP):.1e}")
    else:
        print(f"torchreid is left out: {obstacle}")
    if args.json:
        report: dict[str, Any] = {
            "task": asdict(task),
            "measurements": [asdict(one) for one in found],
            "left_out": obstacle,
        }
        if len(found) == 2:
            report["ratio"] = found[1].seconds / found[0].seconds
        _write_json(args.json, report)
    return 0


def _write_json(path: str, report: dict[str, Any]) -> None:
    with open(path, "w") as file:
        json.dump(report, file, indent=1)


def measure(implementation: str, task: Task, rounds: int) -> Measurement:
    """Evaluates ``rounds`` times in this process, whose peak of memory must not have been reached before."""
    torch.set_num_threads(task.threads)
    function = {"pml_drsl": _ours, "torchreid": _host}[implementation]
    function(make_search(replace(task, queries=30, gallery=90, identities=2)), task.rerank)  # imports and allocations
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
    """Features scattered around their identities' centers so widely that a search finds some matches, not all."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(task.identities, task.dim, generator=generator)
    # Of two squared distances, to a match and to another identity, the means are then so many deviations apart.
    spread = ((task.dim / 2) ** 0.5 / task.separation) ** 0.5
    search: dict[str, Tensor] = {}
    for side, size in (("query", task.queries), ("gallery", task.gallery)):
        ids = torch.randint(0, task.identities, (size,), generator=generator)
        features = torch.randn(size, task.dim, generator=generator).mul_(spread)
        for start in range(0, size, 1024):  # a whole matrix of centers would show in the peak of memory
            features[start : start + 1024] += centers[ids[start : start + 1024]]
        cams = torch.randint(0, task.cameras, (size,), generator=generator)
        search |= {side: features, f"{side}_ids": ids, f"{side}_cams": cams}
    return search


def _ours(search: dict[str, Any], rerank: bool) -> tuple[float, float]:
    result = evaluate(**search, rerank=rerank)
    return result.mAP, result.rank(1)


def _host(search: dict[str, Any], rerank: bool) -> tuple[float, float]:
    metrics = importlib.import_module("torchreid").metrics  # nothing else in this package may need torchreid
    distances = metrics.compute_distance_matrix(search["query"], search["gallery"]).numpy()
    labels = [search[name].numpy() for name in ("query_ids", "gallery_ids", "query_cams", "gallery_cams")]
    cmc, mean_ap = metrics.evaluate_rank(distances, *labels, use_cython=False)
    return float(mean_ap), float(cmc[0])


def _why_no_host(task: Task, args: argparse.Namespace) -> str | None:
    gib = HOST_BYTES_PER_PAIR * task.queries * task.gallery / GIB
    if args.no_host:
        return "as asked"
    if task.rerank:
        return "it is not compared with re-ranking"
    if find_spec("torchreid") is None:
        return "it is not installed (pip install 'pml-drsl[reid]')"
    return f"it would take about {gib:.0f} GiB, over --memory {args.memory:g}" if gib > args.memory else None


def _in_own_process(implementation: str, task: Task, rounds: int) -> Measurement:
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's peak of memory
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, implementation, task, rounds).result()


def _row(one: Measurement) -> str:
    gib = "?" if one.peak_bytes is None else f"{one.peak_bytes / GIB:.2f}"
    return f"{one.implementation:12}{one.seconds:>10.2f}{gib:>10}{one.mAP:>10.2%}{one.rank_1:>10.2%}"
