"""Figures of a file of results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from torchreid_ext.benchmark.report import Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WITH_NEGATIVES = re.compile(r"(?P<loss>.+)-1-to-(?P<negatives>\d+)")
"""A loss that was trained with so many negatives for one positive, in ``configs/losses_rare.yaml``."""


def draw(sections: Sequence[Section], path: Path) -> None:
    """Draws one panel for each section, mean and standard deviation of mAP and rank-1; the suffix gives the format.

    Where the names of losses tell the number of negatives for each positive, the panel has a curve of mAP for each.
    """
    # matplotlib takes long to import, and only a figure needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(sections), 4), layout="constrained")
    for number, section in enumerate(sections, 1):
        axes, scores = figure.add_subplot(1, len(sections), number), section.scores().fillna(0)
        curves = any(WITH_NEGATIVES.fullmatch(loss) for loss in section.lines)
        (_curves if curves else _points)(axes, scores)
        axes.set_title(f"{section.target}, {section.network}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _points(axes: Axes, scores: pd.DataFrame) -> None:
    heights = np.arange(len(scores))[::-1]
    for score, marker, shift in (("mAP", "o", 0.1), ("rank-1", "s", -0.1)):
        mean, deviation = scores[(score, "mean")], scores[(score, "sd")]
        axes.errorbar(mean, heights + shift, xerr=deviation, fmt=marker, label=score, capsize=2)
    axes.set_yticks(heights, scores.index)
    axes.set_xlabel("%")


def _curves(axes: Axes, scores: pd.DataFrame) -> None:
    parts = scores.index.str.extract(WITH_NEGATIVES.pattern).set_index(scores.index)
    rows = scores["mAP"].assign(loss=parts["loss"], negatives=parts["negatives"].astype(float))
    for loss, curve in rows.sort_values("negatives").groupby("loss", sort=False):
        axes.errorbar(curve["negatives"], curve["mean"], yerr=curve["sd"], marker="o", label=loss, capsize=2)
    axes.set_xscale("log")
    axes.set_xlabel("negatives for each positive")
    axes.set_ylabel("mAP (%)")
