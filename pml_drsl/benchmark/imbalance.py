"""Few positives: retrieval quality with one positive and 15, 60, 250 or 1,000 negatives for every query.

The positive and the negatives of a query are drawn at random from the batch (32 identities, 2 images of each) and a
memory of 2,048, which starts after the first epoch: nothing but their ratio changes. The losses have their library's
defaults. They are DRSL and the losses of pytorch-metric-learning that can stand behind a memory.

Examples:
  drsl-benchmark imbalance --quick
  drsl-benchmark imbalance --sets docs/benchmark-sets.yaml --only viper omniglot --root data --weights FILE
"""

from __future__ import annotations

import argparse

from pml_drsl.benchmark import tables
from pml_drsl.benchmark.training import experiment
from pml_drsl.benchmark.training.protocol import FEW_POSITIVES, few_positives


def add_arguments(parser: argparse.ArgumentParser) -> None:
    experiment.add_arguments(parser, of=FEW_POSITIVES)


def run(args: argparse.Namespace) -> int:
    with experiment.prepare(args) as bench:
        trials = [trial for name in bench.sets for loss in bench.losses for trial in few_positives(name, loss).values()]
        bench.run_seeds(trials, "few positives")
    print("\n\n".join(f"{name}\n\n{table}" for name, table in tables.few_positives(bench.results).items()))
    return 0
