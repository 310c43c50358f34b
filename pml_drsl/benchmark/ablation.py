"""What every part and setting of DRSL does for it: one change at a time, on the validation identities.

It starts from ``DRSLoss()`` beside cross-entropy of weight 1, and changes its parts, its settings, the batch, and what
stands beside it. Everything else stays, so that a larger batch, for example, has fewer steps in the same epochs.

Examples:
  drsl-benchmark ablation --quick
  drsl-benchmark ablation --sets docs/benchmark-sets.yaml --only viper --root data --weights mobilenetv2.pth.tar
"""

from __future__ import annotations

import argparse

from pml_drsl.benchmark import tables
from pml_drsl.benchmark.training import experiment
from pml_drsl.benchmark.training.protocol import ablation, on_folds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    experiment.add_arguments(parser, losses=False)


def run(args: argparse.Namespace) -> int:
    with experiment.prepare(args) as bench:
        trials = [
            fold
            for name, of_set in bench.sets.items()
            for _, trial in ablation(name)
            for fold in on_folds(trial, of_set.data.folds)
        ]
        bench.run(trials, "ablation")
    print(tables.ablation(bench.results))
    return 0
