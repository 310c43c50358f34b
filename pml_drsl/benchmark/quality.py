"""Retrieval quality of DRSL and of pytorch-metric-learning's losses, under one protocol.

The same network is trained with each loss: the same start, order of the data, augmentation, optimizer and number of
images shown. In four steps, all kept in one file (run it again, and it goes on where it was):

  1. tune     six settings of every loss, on validation identities cut from the training set;
  2. recipes  the best of them with cross-entropy, a cross-batch memory, smaller batches; on the same identities;
  3. test     every loss alone, with cross-entropy, and by its best recipe, on the test identities, with every seed;
  4. costs    time and memory of a training step.

`drsl-benchmark report` makes a page of tables and plots of the file.

Examples:
  drsl-benchmark quality --quick                          scikit-learn's digits, to see it work
  drsl-benchmark quality --train train/ --test test/      folders of images, one folder per identity
  drsl-benchmark quality -s market1501 --root reid-data --size 128 64 --network osnet_x0_25 --mirror
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pml_drsl.benchmark import costs, experiment, tables
from pml_drsl.benchmark.candidates import CANDIDATES
from pml_drsl.benchmark.experiment import Experiment
from pml_drsl.benchmark.results import Protocol, Results
from pml_drsl.benchmark.tuning import all_recipes, best_first, in_smaller_batches, recipes_of, reported, settings

add_arguments = experiment.add_arguments


def run(args: argparse.Namespace) -> int:
    bench = experiment.prepare(args)
    tune(bench, bench.losses)
    trials = [trial for loss in bench.losses for trial in reported(bench.results, bench.protocol, loss).values()]
    bench.run(trials, "test")
    costs.measure(trials, bench.data, bench.results, bench.machine)
    print(table(bench.results, bench.protocol))
    print(f"{bench.results.path}: all results; drsl-benchmark report {bench.results.path} makes a page of them")
    return 0


def tune(bench: Experiment, losses: Sequence[str]) -> None:
    """Runs, or finds in the file, what chooses the settings and the recipe of every loss."""
    results, protocol = bench.results, bench.protocol
    bench.run([trial for loss in losses for trial in settings(protocol, loss)], "tuning")
    recipes = []
    for loss in losses:
        for trials in recipes_of(protocol, best_first(results, protocol, settings(protocol, loss))).values():
            recipes += trials
    bench.run(recipes, "recipes")
    smaller = [trial for loss in losses for trial in in_smaller_batches(all_recipes(results, protocol, loss))]
    bench.run(smaller, "recipes, smaller batches")


def table(results: Results, protocol: Protocol) -> str:
    """Every loss by every recipe that ran on the test identities: scores in percent, costs beside the cheapest."""
    cheapest = min((cost["seconds"] for cost in results.costs.values()), default=0.0)
    rows = []
    for loss in CANDIDATES:
        for name, trial in reported(results, protocol, loss).items():
            cost = results.costs.get(trial.but(seed=0, epochs=1).key)
            rows.append(
                [loss, name, *(tables.spread(tables.values(results, trial, score)) for score in tables.SCORES)]
                + (["-", "-"] if cost is None else [f"{cost['seconds'] / cheapest:.2f}", _mib(cost["peak_bytes"])])
                + [tables.described(trial, protocol.base)]
            )
    return tables.markdown(["loss", "recipe", *tables.SCORES, "step time", "step memory", "settings"], rows)


def _mib(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**20:.0f} MiB"
