"""Retrieval quality against the number of negatives per positive, from 1:1 to 1:1000.

Every loss trains behind a cross-batch memory, and every query has one positive, drawn at random, and so many negatives,
drawn at random, out of the batch and the memory: nothing but their ratio changes. The losses are DRSL and the four
strongest of the others that can stand behind a memory, on the validation identities. Each takes the settings of its
grid that are best on those identities at the largest ratio.

Examples:
  drsl-benchmark imbalance --quick
  drsl-benchmark imbalance --train train/ --test test/ --results benchmark.jsonl
"""

from __future__ import annotations

import argparse
from statistics import fmean

from pml_drsl.benchmark import experiment, tables
from pml_drsl.benchmark.candidates import CANDIDATES, DRSL
from pml_drsl.benchmark.results import Protocol, Results
from pml_drsl.benchmark.trial import Trial
from pml_drsl.benchmark.tuning import best_first, settings, validation_score

RATIOS = (1, 10, 100, 1000)
OPPONENTS = 4
MEMORY_SIZE = 2048

add_arguments = experiment.add_arguments


def run(args: argparse.Namespace) -> int:
    if args.losses and DRSL not in args.losses:
        raise ValueError(f"--losses: {DRSL} is compared with the others; name it too")
    with experiment.prepare(args) as bench:
        results, protocol = bench.results, bench.protocol
        # A loss with a miner of its own has another's place here.
        can = [loss for loss in bench.losses if CANDIDATES[loss].in_memory and CANDIDATES[loss].miner is None]
        bench.run([trial for loss in can for trial in settings(protocol, loss)], "tuning")
        compared = losses(results, protocol)
        bench.run([trial for loss in compared for trial in at_largest(protocol, loss)], f"tuning, 1:{RATIOS[-1]}")
        bench.run([trial for loss in compared for trial in tested(results, protocol, loss).values()], "test")
    print(table(results, protocol))
    return 0


def losses(results: Results, protocol: Protocol) -> list[str]:
    """DRSL and its opponents, the strongest first, as far as there are results."""
    scores = {}
    for loss, candidate in CANDIDATES.items():
        if candidate.in_memory and candidate.miner is None:
            for trial in best_first(results, protocol, settings(protocol, loss))[:1]:
                scores[loss] = validation_score(results, protocol, trial) or 0.0
    others = sorted(set(scores) - {DRSL}, key=lambda loss: -scores[loss])
    return [DRSL, *others[:OPPONENTS]] if DRSL in scores else []


def at_largest(protocol: Protocol, loss: str) -> list[Trial]:
    """Every setting of a loss, at the largest ratio, on validation."""
    return [_rare(trial, RATIOS[-1]) for trial in settings(protocol, loss)]


def tested(results: Results, protocol: Protocol, loss: str) -> dict[int, Trial]:
    """The trial of every ratio, on test."""
    best = best_first(results, protocol, at_largest(protocol, loss))[:1]
    base = protocol.base
    return {ratio: _rare(trial, ratio).but(split="test", epochs=base.epochs) for trial in best for ratio in RATIOS}


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
