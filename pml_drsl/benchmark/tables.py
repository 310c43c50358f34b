"""What the experiments found as tables, in Markdown that reads as text too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from pml_drsl.benchmark.training.results import Results
from pml_drsl.benchmark.training.trial import Trial

SCORES = ("MAP@R", "P@1", "mAP", "rank-1", "rank-5", "rank-10")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned in plain text too."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def values(results: Results, trial: Trial, score: str = "MAP@R") -> list[float]:
    """A score of the trial with every seed that there is a result of, in [0, 1]."""
    return [results.score(one, score) for one in results.trials() if one.but(seed=trial.seed) == trial]


def spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation, in percent."""
    if not numbers:
        return "-"
    return f"{100 * fmean(numbers):.1f}" + (f" ± {100 * stdev(numbers):.1f}" if len(numbers) > 1 else "")


def parameters(trial: Trial) -> str:
    """Those of the loss, in a few words."""
    return ", ".join(f"{name} {value}" for name, value in trial.parameters.items())


def described(trial: Trial, base: Trial) -> str:
    """Settings of a trial and what it has besides its loss, in a few words."""
    words = [parameters(trial)]
    if trial.cross_entropy:
        words.append(f"cross-entropy * {trial.cross_entropy:g}")
    if trial.memory:
        words.append(f"memory {trial.memory}")
    if trial.lr != base.lr:
        words.append(f"learning rate {trial.lr:g}")
    return ", ".join(words)


def grid(points: Sequence[Mapping[str, Any]]) -> str:
    """What was tried: the values of every parameter where all their combinations were, or else every point."""
    of = {name: list(dict.fromkeys(point.get(name) for point in points)) for name in points[0]}
    if len(points) == math.prod(map(len, of.values())):
        return " x ".join(f"{name} {', '.join(map(str, values))}" for name, values in of.items())
    return "; ".join(" ".join(f"{name} {value}" for name, value in point.items()) for point in points)
