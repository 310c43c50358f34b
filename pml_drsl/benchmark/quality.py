"""Retrieval quality of DRSL and of pytorch-metric-learning's losses, under one protocol.

The same network is trained with each loss: the same start, order of the data, augmentation, optimizer and number of
images shown. In five steps, all kept in one file (run it again, and it goes on where it was):

  1. settings   six of every loss, on validation identities cut from the training set;
  2. recipes    the best of them with cross-entropy, a cross-batch memory, other learning rates; on the same identities;
  3. finalists  the best three of all that, with more seeds, on the same identities;
  4. test       every loss alone, with cross-entropy, and by its best recipe, on the test identities, with every seed;
  5. costs      time and memory of a training step.

`drsl-benchmark report` makes a page of tables and plots of the file.

Examples:
  drsl-benchmark quality --quick                          scikit-learn's digits, to see it work
  drsl-benchmark quality --train train/ --test test/      folders of images, one folder per identity
  drsl-benchmark quality -s market1501 --root reid-data --size 128 64 --network osnet_x0_25 --mirror
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from statistics import fmean

from pml_drsl.benchmark import tables
from pml_drsl.benchmark.training import costs, experiment
from pml_drsl.benchmark.training.candidates import CANDIDATES
from pml_drsl.benchmark.training.experiment import Experiment
from pml_drsl.benchmark.training.results import Protocol, Results
from pml_drsl.benchmark.training.trial import Trial
from pml_drsl.benchmark.training.tuning import (
    ALONE,
    BEST,
    at_other_rates,
    finalists,
    recipes_of,
    reported,
    settings,
)

add_arguments = experiment.add_arguments


def run(args: argparse.Namespace) -> int:
    with experiment.prepare(args) as bench:
        results, protocol = bench.results, bench.protocol
        tune(bench, bench.losses)
        test = [trial for loss in bench.losses for trial in reported(results, protocol, loss).values()]
        bench.run(test, "test", bench.seeds)
        # Of all losses in the file, not only of those that ran now: times of different sittings do not compare.
        costs.measure(tested(results, protocol), bench.data, results, bench.machine)
    print(table(results, protocol))
    print(f"\n{settings_table(results, protocol)}\n")
    path = shlex.quote(str(results.path))
    print(f"{results.path}: all results; drsl-benchmark report {path} makes a page of them")
    return 0


def tune(bench: Experiment, losses: Sequence[str]) -> None:
    """Runs, or finds in the file, what chooses the settings and the recipe of every loss."""
    results, protocol = bench.results, bench.protocol
    bench.run([trial for loss in losses for trial in settings(protocol, loss)], "settings")
    recipes = [recipes_of(results, protocol, loss) for loss in losses]
    bench.run([trial for of_loss in recipes for trials in of_loss.values() for trial in trials], "recipes")
    bench.run([trial for loss in losses for trial in at_other_rates(results, protocol, loss)], "learning rates")
    best = [trial for loss in losses for trial in finalists(results, protocol, loss)]
    bench.run(best, "finalists", protocol.tuning_seeds)


def ranked(results: Results, protocol: Protocol) -> dict[str, dict[str, Trial]]:
    """The losses that ran on the test identities, each with the recipes that did, by name; the best first.

    A loss stands where the MAP@R of its best recipe puts it, which was chosen on validation: another recipe that
    happens to do better on the test does not count. One whose best recipe has not run comes last.
    """
    found = {}
    for loss in CANDIDATES:
        recipes = reported(results, protocol, loss)
        found[loss] = {name: trial for name, trial in recipes.items() if tables.values(results, trial)}

    def of_best(loss: str) -> float:
        return fmean(tables.values(results, found[loss][BEST])) if BEST in found[loss] else -1.0

    return {loss: found[loss] for loss in sorted(found, key=of_best, reverse=True) if found[loss]}


def tested(results: Results, protocol: Protocol) -> list[Trial]:
    return [trial for recipes in ranked(results, protocol).values() for trial in recipes.values()]


def table(results: Results, protocol: Protocol) -> str:
    """Every loss by every recipe that ran on the test identities: scores in percent, costs beside the cheapest."""
    cheapest = min((cost["seconds"] for cost in results.costs.values()), default=0.0)
    rows = []
    for loss, of_loss in ranked(results, protocol).items():
        for name, trial in of_loss.items():
            cost = results.costs.get(costs.costed(trial).key)
            rows.append(
                [loss, name, str(len(tables.values(results, trial)))]
                + [tables.spread(tables.values(results, trial, score)) for score in tables.SCORES]
                + (["-", "-"] if cost is None else [f"{cost['seconds'] / cheapest:.2f}", _mib(cost["peak_bytes"])])
            )
    return tables.markdown(["loss", "recipe", "seeds", *tables.SCORES, "step time", "step memory"], rows)


def settings_table(results: Results, protocol: Protocol) -> str:
    """The settings of every loss that was tested, and its best recipe, which may have other settings."""
    rows = []
    for loss, of_loss in ranked(results, protocol).items():
        said = {name: tables.described(trial, protocol.base) for name, trial in of_loss.items()}
        rows.append([loss, *(said.get(name, "-") for name in (ALONE, BEST))])
    return tables.markdown(["loss", ALONE, BEST], rows)


def _mib(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**20:.1f} MiB"
