"""A page of tables and plots, from the results that the experiments have left in a file.

The text of the page above the line "<!-- generated -->" is kept: it is the place for a conclusion in words. With
--readme, a small table also replaces what stands between "<!-- benchmark: begin -->" and "<!-- benchmark: end -->".

Example:
  drsl-benchmark report docs/benchmark.jsonl --output docs/benchmark.md --readme README.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean

from pml_drsl.benchmark import plots, tables
from pml_drsl.benchmark.training.candidates import CROSS_ENTROPY, DRSL, SMALL_POWER
from pml_drsl.benchmark.training.protocol import ALONE, BESIDE
from pml_drsl.benchmark.training.results import Results
from pml_drsl.benchmark.training.trial import Trial
from pml_drsl.checks import InputError

MARK = "<!-- generated -->"
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
IN_README = 6
"""Losses in the table of the README, DRSL and cross-entropy among them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="?", default=Path("benchmark.jsonl"), help="(%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark.md"), help="page to write, its plots beside it (%(default)s)"
    )
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="page with the two marks to insert a small table at"
    )


def run(args: argparse.Namespace) -> int:
    if not args.results.exists():
        raise InputError(f"{args.results} is not there: run drsl-benchmark quality --results {args.results} first")
    results = Results(args.results)
    if not results.found:
        raise InputError(f"{args.results} holds no results: run drsl-benchmark quality --results {args.results} first")
    page = args.output
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise InputError(f"--output {page}: not a file in a folder that exists")
    readme = None if args.readme is None else with_table(args.readme, results)
    kept = page.read_text(encoding="utf-8").partition(MARK)[0] if page.is_file() else "# Benchmark\n\n"
    pictures = plots.draw(results, page.with_suffix(""))
    text = "\n\n".join(_sections(results, {name: path.name for name, path in pictures.items()}))
    page.write_text(f"{kept}{MARK}\n\n{text}\n", encoding="utf-8")
    if readme is not None:
        args.readme.write_text(readme, encoding="utf-8")
    print(", ".join(map(str, [page, *pictures.values()])), file=sys.stderr)
    return 0


def with_table(page: Path, results: Results) -> str:
    """The text of a page with the small table between its two marks. Raises InputError for a page without them."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"--readme {page}: it must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{small_table(results)}\n{END}{after}"


def small_table(results: Results) -> str:
    """Scores out of the box, "alone / beside cross-entropy", of DRSL, cross-entropy, and the losses with the best mean
    ranks."""
    found = {
        where: tables.scores_of(results, tables.trials_out_of_the_box(results, where)) for where in (ALONE, BESIDE)
    }
    ranks = {where: tables.ranks_of(scores) for where, scores in found.items()}
    losses = [loss for loss in found[BESIDE] if all(loss in ranks[where] for where in (ALONE, BESIDE))]
    losses.sort(key=lambda loss: sum(ranks[where][loss] for where in (ALONE, BESIDE)))
    fixed = [loss for loss in (DRSL, CROSS_ENTROPY) if loss in losses]
    best = [loss for loss in losses if loss not in fixed][: IN_README - len(fixed)]
    rows = []
    for loss in losses:
        if loss in (*fixed, *best):
            cells = [_pair(found[ALONE][loss][one], found[BESIDE][loss][one]) for one in range(len(results.sets))]
            both = f"{ranks[ALONE][loss]:.1f} / {ranks[BESIDE][loss]:.1f}"
            rows.append([f"**{loss}**" if loss == DRSL else loss, *cells, both])
    header = ["loss", *(f"{name}, {of_set['score']}" for name, of_set in results.sets.items()), "mean rank"]
    return tables.markdown(header, rows)


def _pair(alone: list[float], beside: list[float]) -> str:
    return f"{100 * fmean(alone):.1f} / {100 * fmean(beside):.1f}"


def _sections(results: Results, pictures: dict[str, str]) -> list[str]:
    return [
        "## Data sets and recipes",
        _sets(results),
        *_out_of_the_box(results, pictures),
        *_tuned(results),
        *_few_positives(results, pictures),
        *_batches(results),
        *_ablation(results),
        *_costs(results),
        "## Machine",
        *sorted({row["machine"] for row in results.found.values()}),
        *_failures(results),
    ]


def _costs(results: Results) -> list[str]:
    if not results.costs:
        return []
    return [
        "## Costs",
        "Of a training step, network included: its time, relative to the cheapest loss in the table, and the most "
        "memory that its tensors take at once. Every loss has its library's defaults, and stands alone.",
        tables.costs(results),
    ]


def _out_of_the_box(results: Results, pictures: dict[str, str]) -> list[str]:
    if "quality" not in pictures:
        return []
    return [
        "## Out of the box",
        "Every loss with its library's defaults. Scores in percent on the test identities, mean ± standard deviation "
        "over the seeds; mean rank over the sets, 1 being the best of the losses that have one. `DRSL (power 0.1)` is "
        "`DRSLoss(bound_power=0.1)`, which is not the default and takes no rank.",
        f"![Scores of every loss]({pictures['quality']})",
        tables.out_of_the_box(results),
        *_differences(results, "alone", tables.trials_out_of_the_box(results, ALONE)),
        *_differences(results, "beside cross-entropy", tables.trials_out_of_the_box(results, BESIDE)),
    ]


def _sets(results: Results) -> str:
    rows = []
    for name, of_set in results.sets.items():
        recipe = of_set["recipe"]
        network = recipe["network"] + (" with starting weights" if recipe["weights"] else "")
        rows.append(
            [
                name,
                " in ".join(map(str, reversed(of_set["training"]))),
                " in ".join(map(str, reversed(of_set["test"]))) + (", drawn by the seed" if of_set["drawn"] else ""),
                " x ".join(map(str, of_set["size"])),
                network,
                f"{recipe['identities']} x {recipe['instances']}",
                f"{recipe['epochs']}, Adam {recipe['lr']:g}",
                str(of_set["folds"]),
            ]
        )
    header = ["set", "training images in identities", "test images in identities", "image", "network", "batch"]
    return tables.markdown([*header, "epochs", "folds"], rows)


def _differences(results: Results, title: str, trials: dict[str, list[Trial | None]]) -> list[str]:
    found = {ours: tables.differences(results, trials, ours) for ours in (DRSL, SMALL_POWER)}
    return [
        part
        for ours, table in found.items()
        if table != tables.NOTHING
        for part in (
            f"{ours} less each other loss, {title}, in points, with the 95 % interval of a paired bootstrap over the "
            "test identities; an asterisk stands where the interval leaves out 0:",
            table,
        )
    ]


def _tuned(results: Results) -> list[str]:
    chosen = tables.chosen(results)
    if chosen == tables.NOTHING:
        return []
    return [
        "## Tuned",
        "Every loss by the trial that had the best mean over the folds of validation.",
        tables.tuned(results),
        *_differences(results, "tuned", tables.trials_tuned(results)),
        "What validation chose:",
        chosen,
        "The settings that were tried:",
        tables.grid(results),
    ]


def _few_positives(results: Results, pictures: dict[str, str]) -> list[str]:
    found = tables.few_positives(results)
    if not found:
        return []
    return [
        "## Few positives",
        "Test score in percent with one positive and so many negatives for every query, drawn at random from the batch "
        "and a memory. Every loss has its library's defaults, and stands alone.",
        f"![Score against the number of negatives]({pictures['imbalance']})",
        *(part for name, table in found.items() for part in (f"{name}:", table)),
    ]


def _batches(results: Results) -> list[str]:
    found = tables.batches(results)
    if not found:
        return []
    return [
        "## Large batches",
        "Test score in percent with batches of several sizes, at equal numbers of images shown: the larger batch has "
        "fewer steps. Every loss has its library's defaults, and stands alone. Behind each score stands the learning "
        "rate, the best of three on validation.",
        *(part for name, table in found.items() for part in (f"{name}:", table)),
    ]


def _ablation(results: Results) -> list[str]:
    found = [table for where in (ALONE, BESIDE) if (table := tables.ablation(results, where)) != tables.NOTHING]
    if not found:
        return []
    return [
        "## Ablation",
        "Validation score in percent, mean over the folds, with one change at a time to `DRSLoss()`, alone and beside "
        "cross-entropy of weight 1. The last column is the mean over the sets of what the change adds.",
        *found,
    ]


def _failures(results: Results) -> list[str]:
    number = sum("failure" in row for row in results.found.values())
    return [f"{number} run(s) ended with a loss that was not finite, and count as a score of 0."] if number else []
