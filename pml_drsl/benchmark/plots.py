"""The results of experiments as pictures, readable at the width of a page and by the colour-blind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pml_drsl.benchmark import tables
from pml_drsl.benchmark.timing.table import COLORS, MARKERS
from pml_drsl.benchmark.training.candidates import DRSL
from pml_drsl.benchmark.training.protocol import ALONE, BESIDE, NEGATIVES
from pml_drsl.benchmark.training.results import Results

STYLES = {ALONE: ("o", "#0072B2"), BESIDE: ("s", "#E69F00"), "tuned": ("D", "#000000")}


def draw(results: Results, stem: Path) -> dict[str, Path]:
    """Writes a picture of each experiment that has results, ``STEM-quality.png`` and ``STEM-imbalance.png``."""
    pictures = {}
    for name, plot in (("quality", _quality), ("imbalance", _imbalance)):
        figure = plot(results)
        if figure is not None:
            pictures[name] = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(pictures[name], dpi=110)
    return pictures


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _percent(scores: Sequence[float]) -> tuple[float, float]:
    return 100 * fmean(scores), 100 * stdev(scores) if len(scores) > 1 else 0.0


def _quality(results: Results) -> Any:
    """Every loss on every set, a panel for each set; the best mean rank beside cross-entropy comes first."""
    found = {
        ALONE: tables.scores_of(results, tables.trials_out_of_the_box(results, ALONE)),
        BESIDE: tables.scores_of(results, tables.trials_out_of_the_box(results, BESIDE)),
        "tuned": tables.scores_of(results, tables.trials_tuned(results)),
    }
    found = {title: scores for title, scores in found.items() if scores}
    if not found:
        return None
    ranks = tables.ranks_of(found.get(BESIDE, {}))
    names = dict.fromkeys(loss for scores in found.values() for loss in scores)
    losses = sorted(names, key=lambda loss: ranks.get(loss, math.inf))
    columns = min(2, len(results.sets))
    rows = math.ceil(len(results.sets) / columns)
    figure = _figure(4.6 * columns + 1, rows * (1.2 + 0.26 * len(losses)))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for index, ((name, of_set), panel) in enumerate(zip(results.sets.items(), panels, strict=False)):
        _points(
            panel,
            {title: {loss: one[index] for loss, one in scores.items()} for title, scores in found.items()},
            losses,
        )
        panel.set_xlabel(f"{name}: test {of_set['score']}, %", fontsize=9)
    for panel in list(panels):
        panel.set_visible(False)
    handles = {line.get_label(): line for panel in figure.axes for line in panel.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def _points(panel: Any, found: Mapping[str, Mapping[str, list[float]]], losses: Sequence[str]) -> None:
    for offset, (title, (marker, color)) in zip((-0.22, 0.0, 0.22), STYLES.items(), strict=True):
        scores = found.get(title, {})
        points = {row: _percent(scores[loss]) for row, loss in enumerate(losses) if scores.get(loss)}
        if points:
            panel.errorbar(
                [mean for mean, _ in points.values()],
                [row - offset for row in points],
                xerr=[deviation for _, deviation in points.values()],
                fmt=marker,
                color=color,
                capsize=2,
                markersize=4,
                linewidth=1,
                label=title,
            )
    panel.set_yticks(range(len(losses)), losses, fontsize=8)
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == DRSL else "normal")
    for row in range(1, len(losses), 2):
        panel.axhspan(row - 0.5, row + 0.5, color="#f2f2f2", zorder=0)
    panel.set_ylim(len(losses) - 0.5, -0.5)
    panel.grid(axis="x", alpha=0.3)


def _imbalance(results: Results) -> Any:
    """The score of every loss against the number of negatives, a panel for each set."""
    found = {name: scores for name in results.sets if (scores := tables.scores_few_positives(results, name))}
    if not found:
        return None
    figure = _figure(4.6 * len(found) + 1, 4.2)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for panel, (name, of_loss) in zip(panels, found.items(), strict=True):
        for index, (loss, of_number) in enumerate(of_loss.items()):
            points = {number: _percent(scores) for number, scores in of_number.items() if scores}
            panel.errorbar(
                # Side by side, so that no bar hides another.
                [number * 1.06 ** (index - len(of_loss) // 2) for number in points],
                [mean for mean, _ in points.values()],
                yerr=[deviation for _, deviation in points.values()],
                label=loss,
                color=COLORS[index],
                marker=MARKERS[index],
                capsize=3,
                linewidth=2.5 if loss == DRSL else 1.2,
            )
        panel.set_xscale("log")
        panel.set_xticks(NEGATIVES, [f"1:{number}" for number in NEGATIVES])
        panel.minorticks_off()
        panel.set_xlabel(f"{name}: positives to negatives of a query")
        panel.set_ylabel(f"test {results.sets[name]['score']}, %")
        panel.grid(alpha=0.3)
    handles = {line.get_label(): line for panel in panels for line in panel.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5, frameon=False)
    return figure
