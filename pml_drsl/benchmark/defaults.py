"""Every loss out of the box: with its library's defaults, alone and beside cross-entropy of weight 1.

Nothing is tuned: this is what a user gets who takes a loss without a change. The same network is trained with each:
the same start, order of the data, augmentation, optimizer and number of images shown. A loss that has weights of its
own trains them at a learning rate of 0.01. All results are kept in one file: run the command again, and it goes on.

Examples:
  drsl-benchmark defaults --quick
  drsl-benchmark defaults --sets docs/benchmark-sets.yaml --root data --weights mobilenetv2.pth.tar
"""

from __future__ import annotations

import argparse
import shlex

from pml_drsl.benchmark import tables
from pml_drsl.benchmark.training import experiment
from pml_drsl.benchmark.training.protocol import out_of_the_box

add_arguments = experiment.add_arguments


def run(args: argparse.Namespace) -> int:
    with experiment.prepare(args) as bench:
        trials = [
            trial for name in bench.sets for loss in bench.losses for trial in out_of_the_box(name, loss).values()
        ]
        bench.run_seeds(trials, "out of the box")
    print(tables.out_of_the_box(bench.results))
    path = shlex.quote(str(bench.results.path))
    print(f"\n{path}: all results; drsl-benchmark report {path} makes a page of them")
    return 0
