"""Large batches: retrieval quality with batches of 64, 256 and 1,024 images, at equal numbers of images shown.

A larger batch gives every query more negatives, and the network fewer steps. Each loss has its library's defaults, and
stands alone. At each size of the batch, three learning rates are tried on the validation identities (0.5, 1.5 and 5
times the recipe's), and the best is trained on all training identities and tested. All results are kept in one file:
run the command again, and it goes on.

Examples:
  drsl-benchmark batches --quick --batches 8
  drsl-benchmark batches --sets docs/benchmark-sets.yaml --only omniglot --root data
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from pml_drsl.benchmark import tables
from pml_drsl.benchmark.training import experiment
from pml_drsl.benchmark.training.protocol import BATCHES, OF_BATCHES, best_of_batches, by_batch
from pml_drsl.benchmark.training.sets import BenchmarkSet
from pml_drsl.checks import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batches", type=int, nargs="+", default=list(BATCHES), metavar="N", help="images in a batch (%(default)s)"
    )
    experiment.add_arguments(parser, of=OF_BATCHES)


def run(args: argparse.Namespace) -> int:
    sizes = args.batches
    with experiment.prepare(args, partial(_check, sizes)) as bench:
        results = bench.results
        trials = [
            trial
            for name in bench.sets
            for loss in bench.losses
            for of_size in by_batch(results.sets[name], loss, sizes).values()
            for trial in of_size
        ]
        bench.validate(trials, "learning rates")
        pairs = [(name, loss) for name in bench.sets for loss in bench.losses]
        bench.run_seeds(
            [trial for pair in pairs for trial in best_of_batches(results, *pair, sizes).values()], "batches"
        )
    print("\n\n".join(f"{name}\n\n{table}" for name, table in tables.batches(results, sizes).items()))
    return 0


def _check(sizes: Sequence[int], of_set: BenchmarkSet) -> None:
    """Raises InputError for a size of which a fold of validation cannot make a batch."""
    instances = of_set.recipe.instances
    fewest = min(of_set.data.split(fold)[0].identities for fold in of_set.data.splits)
    for size in sizes:
        if size % instances or not 2 <= size // instances <= fewest:
            raise InputError(
                f"--batches {size}: a batch of {of_set.name} has {instances} images of each identity, and validation "
                f"trains on as few as {fewest} identities; give a multiple of {instances} from {2 * instances} to "
                f"{fewest * instances}"
            )
