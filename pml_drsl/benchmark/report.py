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
from pml_drsl.benchmark.candidates import CANDIDATES, DRSL
from pml_drsl.benchmark.results import Protocol, Results
from pml_drsl.benchmark.tuning import BEST, reported

MARK = "<!-- generated -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="?", default=Path("benchmark.jsonl"), help="(%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark.md"), help="page to write, its plots beside it (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    if not args.results.is_file():
        raise ValueError(f"{args.results} is not there: run drsl-benchmark quality --results {args.results} first")
    results = Results(args.results)
    if results.protocol is None or not results.found:
        raise ValueError(f"{args.results} holds no results: run drsl-benchmark quality --results {args.results} first")
    page = args.output
    kept = page.read_text().partition(MARK)[0] if page.is_file() else "# Benchmark\n\n"
    pictures = plots.draw(results, results.protocol, page.with_suffix(""))
    text = "\n\n".join(_sections(results, results.protocol, {name: path.name for name, path in pictures.items()}))
    page.write_text(f"{kept}{MARK}\n\n{text}\n")
    print(", ".join(map(str, [page, *pictures.values()])), file=sys.stderr)
    return 0


def _sections(results: Results, protocol: Protocol, pictures: dict[str, str]) -> Sequence[str]:
    base = protocol.base
    machines = sorted({row["machine"] for row in results.found.values()})
    sections = [
        "## Quality",
        _standing(results, protocol),
        f"![MAP@R of every loss]({pictures['quality']})",
        "Scores in percent on the test identities, mean ± standard deviation over the seeds. Step time is relative to "
        "the cheapest; step memory is what training adds to the peak of a process.",
        quality.table(results, protocol),
        f"Data {base.data}; network {base.network}; batches of {base.identities} x {base.instances}; {base.epochs} "
        f"epochs, Adam {base.lr:g} with cosine decay; {base.precision} network, float32 loss. Settings were tried for "
        f"{protocol.tuning_epochs} epochs, recipes for {base.epochs}, {protocol.tuning_seeds} run(s) each, on "
        "validation identities cut from the training set. The grids:",
        tables.markdown(
            ["loss", "tried"],
            [[loss, "; ".join(_point(point) for point in one.grid)] for loss, one in CANDIDATES.items()],
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
            "MAP@R in percent on the validation identities, one change at a time to DRSL alone as tuned.",
            f"![MAP@R with each change]({pictures['ablation']})",
            ablation.table(results, protocol),
        ]
    return [*sections, "## Machine", *machines]


def _point(point: dict[str, object]) -> str:
    return " ".join(f"{name} {value}" for name, value in point.items())


def _standing(results: Results, protocol: Protocol) -> str:
    """Where DRSL stands among the losses, each by its best recipe, in one sentence of the numbers."""
    of_loss = {loss: reported(results, protocol, loss).get(BEST) for loss in CANDIDATES}
    found = {loss: tables.values(results, trial) for loss, trial in of_loss.items() if trial is not None}
    found = {loss: scores for loss, scores in found.items() if scores}
    if DRSL not in found or len(found) < 2:
        return "Not enough has run to compare DRSL with another loss."
    ranked = sorted(found, key=lambda loss: -fmean(found[loss]))
    other = next(loss for loss in ranked if loss != DRSL)
    gap = 100 * (fmean(found[DRSL]) - fmean(found[other]))
    widest = 100 * max((stdev(scores) for scores in (found[DRSL], found[other]) if len(scores) > 1), default=0.0)
    return (
        f"Each by its best recipe, DRSL is number {ranked.index(DRSL) + 1} of {len(ranked)} by test MAP@R: "
        f"{tables.spread(found[DRSL])}, against {tables.spread(found[other])} of {other}, the best of the others: "
        f"{gap:+.1f} points, where the larger standard deviation of the two is {widest:.1f}."
    )
