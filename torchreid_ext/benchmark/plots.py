"""Figures of a file of results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchreid_ext.benchmark.report import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WITH_NEGATIVES = re.compile(r"(?P<loss>.+)-1-to-(?P<negatives>\d+)")
"""A loss that was trained with so many negatives for one positive, in ``configs/losses_rare.yaml``."""


def draw(sections: Sequence[Section], path: Path) -> None:
    """Draws one panel for each section, mean and standard deviation of mAP and rank-1; the suffix gives the format.

    Where the names of losses tell the number of negatives for each positive, the panel has a curve for each loss.
    """
    # matplotlib takes long to import, and only a figure needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(sections), 4), layout="constrained")
    for number, section in enumerate(sections, 1):
        curves = any(WITH_NEGATIVES.fullmatch(loss) for loss in section.lines)
        (_curves if curves else _points)(figure, section, (1, len(sections), number))
    figure.savefig(path, dpi=120)


def _points(figure: Figure, section: Section, place: tuple[int, int, int]) -> None:
    axes, scores = figure.add_subplot(*place), section.scores().iloc[::-1]
    for score, marker, shift in (("mAP", "o", 0.1), ("rank-1", "s", -0.1)):
        heights = [index + shift for index in range(len(scores))]
        means, deviations = scores[(score, "mean")], scores[(score, "sd")].fillna(0)
        axes.errorbar(means, heights, xerr=deviations, fmt=marker, label=score, capsize=2)
    axes.set_yticks(range(len(scores)), scores.index)
    axes.set_xlabel("%")
    axes.set_title(f"{section.target}, {section.network}")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()


def _curves(figure: Figure, section: Section, place: tuple[int, int, int]) -> None:
    axes, scores = figure.add_subplot(*place), section.scores()
    matches = [match for name in scores.index if (match := WITH_NEGATIVES.fullmatch(name))]
    found = [(match["loss"], int(match["negatives"]), match.string) for match in matches]
    for loss in dict.fromkeys(name for name, _, _ in found):
        points = sorted((negatives, name) for each, negatives, name in found if each == loss)
        rows = scores.loc[[name for _, name in points]]
        axes.errorbar(
            [negatives for negatives, _ in points],
            rows[("mAP", "mean")],
            yerr=rows[("mAP", "sd")].fillna(0),
            marker="o",
            label=loss,
            capsize=2,
        )
    axes.set_xscale("log")
    axes.set_xlabel("negatives for each positive")
    axes.set_ylabel("mAP (%)")
    axes.set_title(f"{section.target}, {section.network}")
    axes.grid(alpha=0.3)
    axes.legend()
