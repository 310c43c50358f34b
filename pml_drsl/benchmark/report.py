"""A page of tables and plots, from the results that quality, imbalance and ablation have left in a file.

What stands in the page above the line "<!-- generated -->" is kept: it is the place for a conclusion in words.

Example:
  drsl-benchmark report docs/benchmark.jsonl --output docs/benchmark.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from pml_drsl.benchmark import ablation, imbalance, plots, quality, tables
from pml_drsl.benchmark.training.candidates import CANDIDATES, DRSL
from pml_drsl.benchmark.training.results import Protocol, Results
from pml_drsl.benchmark.training.tuning import BEST, settings
from pml_drsl.checks import InputError

MARK = "<!-- generated -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="?", default=Path("benchmark.jsonl"), help="(%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark.md"), help="page to write, its plots beside it (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    if not args.results.exists():
        raise InputError(f"{args.results} is not there: run drsl-benchmark quality --results {args.results} first")
    results = Results(args.results)
    if results.protocol is None or not results.found:
        raise InputError(f"{args.results} holds no results: run drsl-benchmark quality --results {args.results} first")
    page = args.output
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise InputError(f"--output {page}: not a file in a folder that exists")
    kept = page.read_text(encoding="utf-8").partition(MARK)[0] if page.is_file() else "# Benchmark\n\n"
    pictures = plots.draw(results, results.protocol, page.with_suffix(""))
    text = "\n\n".join(_sections(results, results.protocol, {name: path.name for name, path in pictures.items()}))
    page.write_text(f"{kept}{MARK}\n\n{text}\n", encoding="utf-8")
    print(", ".join(map(str, [page, *pictures.values()])), file=sys.stderr)
    return 0


def _sections(results: Results, protocol: Protocol, pictures: dict[str, str]) -> Sequence[str]:
    base = protocol.base
    machines = sorted({row["machine"] for row in results.found.values()})
    sections = []
    if "quality" in pictures:
        sections += [
            "## Quality",
            _standing(results, protocol),
            f"![MAP@R of every loss]({pictures['quality']})",
            "Scores in percent on the test identities, mean ± standard deviation over the seeds, the best loss first: "
            "by MAP@R of its best recipe, which validation chose. Step time is relative to the cheapest; step memory "
            "is the most that the tensors of a training step take beyond what is there before it.",
            quality.table(results, protocol),
            f"Settings that validation chose; the learning rate is {base.lr:g} where none is named:",
            quality.settings_table(results, protocol),
        ]
    sections += [
        "## Protocol",
        f"Data {base.data}; network {base.network}; batches of {base.identities} x {base.instances}; {base.epochs} "
        f"epochs, Adam {base.lr:g} with cosine decay; {base.precision} network, float32 loss. Settings and recipes "
        f"were tried on validation identities cut from the training set, with one run each and "
        f"{protocol.tuning_seeds} of the best three of every loss."
        + _failures(results)
        + ' The grids ("x": all combinations):',
        tables.markdown(
            ["loss", "tried"],
            [
                [loss, tables.grid([trial.parameters for trial in tried])]
                for loss in CANDIDATES
                if (tried := [trial for trial in settings(protocol, loss) if trial in results])
            ],
        ),
    ]
    if "imbalance" in pictures:
        sections += [
            "## Imbalance",
            "Test MAP@R in percent against negatives per positive, one positive per query, behind a memory of "
            f"{imbalance.MEMORY_SIZE}.",
            f"![MAP@R against the ratio]({pictures['imbalance']})",
            imbalance.table(results, protocol),
        ]
    if "ablation" in pictures:
        sections += [
            "## Ablation",
            "MAP@R in percent on the validation identities, one change at a time to DRSL by its best recipe.",
            f"![MAP@R with each change]({pictures['ablation']})",
            ablation.table(results, protocol),
        ]
    return [*sections, "## Machine", *machines]


def _failures(results: Results) -> str:
    number = sum("failure" in row for row in results.found.values())
    return f" {number} run(s) ended with a loss that was not finite, and count as a score of 0." if number else ""


def _standing(results: Results, protocol: Protocol) -> str:
    """Where DRSL stands among the losses, each by its best recipe, in one sentence of the numbers."""
    ranked = quality.ranked(results, protocol)
    found = {loss: tables.values(results, of_loss[BEST]) for loss, of_loss in ranked.items() if BEST in of_loss}
    if DRSL not in found or len(found) < 2:
        return "Not enough has run to compare DRSL with another loss."
    other = next(loss for loss in found if loss != DRSL)
    gap = 100 * (fmean(found[DRSL]) - fmean(found[other]))
    if min(len(found[DRSL]), len(found[other])) > 1:
        widest = 100 * max(stdev(found[DRSL]), stdev(found[other]))
        certainty = f"the larger standard deviation of the two is {widest:.1f}."
    else:
        certainty = "with fewer than two seeds of one of them, there is nothing to judge the difference by."
    return (
        f"Each by its best recipe, DRSL is number {list(found).index(DRSL) + 1} of {len(found)} by test MAP@R: "
        f"{tables.spread(found[DRSL])}, against {tables.spread(found[other])} of {other}, the best of the others: "
        f"{gap:+.1f} points; {certainty}"
    )
