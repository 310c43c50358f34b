"""Retrieval quality of DRSL and of pytorch-metric-learning's losses, out of the box and tuned.

The same network is trained with each loss: the same start, order of the data, augmentation, optimizer and number of
images shown. In four steps, all kept in one file (run the command again, and it goes on):

  1. out of the box  every loss with its library's defaults, as `drsl-benchmark defaults` does;
  2. weights         its default beside cross-entropy of weight 0, 0.1, 0.3, 1, 3 and 10;
  3. settings        six settings of every loss at the best of these weights;
  4. tuned           the best of steps 2 and 3, on the test identities, with every seed.

Steps 2 and 3 train on a part of the training identities and are scored on the rest, once for every fold. A fold holds
out whole groups (the alphabets of characters), or people drawn at random. The mean over the folds chooses.
`drsl-benchmark report` makes a page of tables and plots of the file.

Examples:
  drsl-benchmark quality --quick                          scikit-learn's digits, to see it work
  drsl-benchmark quality --train train/ --test test/      folders of images, one folder per identity
  drsl-benchmark quality -s market1501 --root reid-data --size 128 64 --network osnet_x0_25 --mirror
  drsl-benchmark quality --sets docs/benchmark-sets.yaml --root data --weights mobilenetv2.pth.tar
"""

from __future__ import annotations

import argparse
import shlex

from pml_drsl.benchmark import tables
from pml_drsl.benchmark.training import costs, experiment
from pml_drsl.benchmark.training.protocol import WEIGHTS, by_setting, by_weight, out_of_the_box, tuned

QUICK_WEIGHTS = (0.0, 1.0)
QUICK_SETTINGS = 2

add_arguments = experiment.add_arguments


def run(args: argparse.Namespace) -> int:
    with experiment.prepare(args) as bench:
        results = bench.results
        pairs = [(name, loss) for name in bench.sets for loss in bench.losses]
        bench.run_seeds([trial for pair in pairs for trial in out_of_the_box(*pair).values()], "out of the box")
        weights, settings = (QUICK_WEIGHTS, QUICK_SETTINGS) if bench.quick else (WEIGHTS, None)
        bench.validate([trial for pair in pairs for trial in by_weight(*pair, weights)], "weights")
        bench.validate([trial for pair in pairs for trial in by_setting(results, *pair, settings)], "settings")
        best = [trial for pair in pairs if (trial := tuned(results, *pair)) is not None]
        bench.run_seeds(best, "tuned")
        for of_set in bench.sets.values():
            costs.measure(of_set, bench.losses, results, bench.machine)
    print(f"Out of the box\n\n{tables.out_of_the_box(results)}\n\nTuned\n\n{tables.tuned(results)}\n")
    print(f"{tables.chosen(results)}\n\n{tables.costs(results)}\n")
    path = shlex.quote(str(results.path))
    print(f"{results.path}: all results; drsl-benchmark report {path} makes a page of them")
    return 0
