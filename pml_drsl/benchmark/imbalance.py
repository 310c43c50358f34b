"""Retrieval quality against the number of negatives per positive, from 1:1 to 1:1000.

Every loss trains behind a cross-batch memory, and every query has one positive, drawn at random, and so many negatives,
drawn at random, out of the batch and the memory: nothing but their ratio changes. The losses are DRSL and the four
strongest of the others that can stand behind a memory. Each has the settings with which it was best behind a memory on
the validation identities (the recipe of `drsl-benchmark quality`, which runs first where its results are not in the
file), and keeps them at every ratio.

Examples:
  drsl-benchmark imbalance --quick
  drsl-benchmark imbalance --train train/ --test test/ --results benchmark.jsonl
"""

from __future__ import annotations

import argparse
from statistics import fmean

from pml_drsl.benchmark import quality, tables
from pml_drsl.benchmark.training import experiment
from pml_drsl.benchmark.training.candidates import CANDIDATES, DRSL
from pml_drsl.benchmark.training.results import Protocol, Results
from pml_drsl.benchmark.training.trial import Trial
from pml_drsl.benchmark.training.tuning import MEMORY, best_of, score
from pml_drsl.checks import InputError

RATIOS = (1, 10, 100, 1000)
OPPONENTS = 4
MEMORY_SIZE = 2048

add_arguments = experiment.add_arguments


def run(args: argparse.Namespace) -> int:
    if args.losses and DRSL not in args.losses:
        raise InputError(f"--losses: {DRSL} is compared with the others; name it too")
    with experiment.prepare(args) as bench:
        results, protocol = bench.results, bench.protocol
        # A loss with a miner of its own has another's place here.
        can = [loss for loss in bench.losses if CANDIDATES[loss].in_memory and CANDIDATES[loss].miner is None]
        quality.tune(bench, can)
        compared = losses(results, protocol)
        test = [trial for loss in compared for trial in tested(results, protocol, loss).values()]
        bench.run(test, "test", bench.seeds)
    print(table(results, protocol))
    return 0


def losses(results: Results, protocol: Protocol) -> list[str]:
    """DRSL and its opponents, the strongest behind a memory first, as far as there are results."""
    scores = {}
    for loss, candidate in CANDIDATES.items():
        trial = best_of(results, protocol, loss, MEMORY) if candidate.miner is None else None
        if trial is not None:
            scores[loss] = score(results, trial) or 0.0
    others = sorted(set(scores) - {DRSL}, key=lambda loss: -scores[loss])
    return [DRSL, *others[:OPPONENTS]] if DRSL in scores else []


def tested(results: Results, protocol: Protocol, loss: str) -> dict[int, Trial]:
    """The trial of every ratio, on test."""
    best = best_of(results, protocol, loss, MEMORY)
    return {} if best is None else {ratio: _rare(best, ratio).but(split="test") for ratio in RATIOS}


def _rare(trial: Trial, ratio: int) -> Trial:
    """As many images in a batch, of as many identities as it can hold."""
    identities = trial.identities * trial.instances // 2
    return trial.but(memory=MEMORY_SIZE, negatives_per_positive=float(ratio), identities=identities, instances=2)


def table(results: Results, protocol: Protocol) -> str:
    """MAP@R of each loss at each ratio, in percent, and what is lost from its best ratio to the largest."""
    rows = []
    for loss in losses(results, protocol):
        of_ratio = {ratio: tables.values(results, trial) for ratio, trial in tested(results, protocol, loss).items()}
        if not of_ratio or not all(of_ratio.values()):
            continue
        means = [fmean(scores) for scores in of_ratio.values()]
        some = tested(results, protocol, loss)[RATIOS[-1]]
        lost = f"{100 * (means[-1] - max(means)):+.1f}"
        rows.append([loss, *map(tables.spread, of_ratio.values()), lost, tables.parameters(some)])
    return tables.markdown(
        ["loss", *(f"1:{ratio}" for ratio in RATIOS), f"1:{RATIOS[-1]} less the best", "settings"], rows
    )
