"""The results as pictures, readable at the width of a page and by the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, quantiles, stdev
from typing import Any

from pml_drsl.benchmark import ablation, imbalance, quality, tables
from pml_drsl.benchmark.timing.table import COLORS, MARKERS
from pml_drsl.benchmark.training.candidates import CROSS_ENTROPY, DRSL
from pml_drsl.benchmark.training.results import Protocol, Results
from pml_drsl.benchmark.training.tuning import ALONE, BEST

STYLES = {ALONE: ("o", "#0072B2"), CROSS_ENTROPY: ("s", "#E69F00"), BEST: ("D", "#000000")}


def draw(results: Results, protocol: Protocol, stem: Path) -> dict[str, Path]:
    """Writes a picture of each experiment that has results, ``STEM-quality.png`` and so on; returns their paths."""
    pictures = {}
    for name, plot in (("quality", _quality), ("imbalance", _imbalance), ("ablation", _ablation)):
        figure = plot(results, protocol)
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


def _quality(results: Results, protocol: Protocol) -> Any:
    found = {
        loss: {name: tables.values(results, trial) for name, trial in recipes.items()}
        for loss, recipes in quality.ranked(results, protocol).items()
    }
    if not found:
        return None
    figure = _figure(8, 1.2 + 0.32 * len(found))
    panel = figure.subplots()
    for offset, (name, (marker, color)) in zip((-0.22, 0.0, 0.22), STYLES.items(), strict=True):
        points = {row: _percent(found[loss][name]) for row, loss in enumerate(found) if name in found[loss]}
        panel.errorbar(
            [mean for mean, _ in points.values()],
            [row - offset for row in points],
            xerr=[deviation for _, deviation in points.values()],
            fmt=marker,
            color=color,
            capsize=2,
            markersize=5,
            linewidth=1,
            label={CROSS_ENTROPY: "with cross-entropy"}.get(name, name),
        )
    panel.set_yticks(range(len(found)), list(found))
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == DRSL else "normal")
    for row in range(1, len(found), 2):
        panel.axhspan(row - 0.5, row + 0.5, color="#f2f2f2", zorder=0)
    panel.set_ylim(len(found) - 0.5, -0.5)
    panel.set_xlabel("test MAP@R, %: mean and standard deviation over the seeds")
    panel.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _imbalance(results: Results, protocol: Protocol) -> Any:
    curves = {
        loss: {
            ratio: _percent(scores)
            for ratio, trial in imbalance.tested(results, protocol, loss).items()
            if (scores := tables.values(results, trial))
        }
        for loss in imbalance.losses(results, protocol)
    }
    if not any(curves.values()):
        return None
    figure = _figure(8, 4.5)
    panel = figure.subplots()
    for index, (loss, points) in enumerate(curves.items()):
        panel.errorbar(
            # Side by side, so that no bar hides another.
            [ratio * 1.06 ** (index - len(curves) // 2) for ratio in points],
            [mean for mean, _ in points.values()],
            yerr=[deviation for _, deviation in points.values()],
            label=loss,
            color=COLORS[index],
            marker=MARKERS[index],
            capsize=3,
            linewidth=2.5 if loss == DRSL else 1.2,
        )
    panel.set_xscale("log")
    panel.set_xticks(imbalance.RATIOS, [f"1:{ratio}" for ratio in imbalance.RATIOS])
    panel.minorticks_off()
    panel.set_xlabel("positives : negatives of a query")
    panel.set_ylabel("test MAP@R, %")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(curves), frameon=False)
    return figure


def _ablation(results: Results, protocol: Protocol) -> Any:
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for change, scores in ablation.found(results, protocol):
        groups.setdefault(change.group, {})[change.label] = _percent(scores)
    if not groups:
        return None
    low, high = _bulk([point for points in groups.values() for point in points.values()])
    columns = _columns({name: len(points) + 2 for name, points in groups.items()})
    rows = max(sum(column.values()) for column in columns)
    figure = _figure(9, 0.5 + 0.22 * rows)
    tuned = ablation.tuned(results, protocol)
    # In letters: the panels of both columns are to be equally wide, beside their labels.
    widths = [55 + max(len(label) for name in column for label in groups[name]) for column in columns]
    parts = figure.subfigures(1, len(columns), squeeze=False, width_ratios=widths)[0]
    for part, column in zip(parts, columns, strict=True):
        panels = part.subplots(len(column), 1, squeeze=False, height_ratios=list(column.values()))[:, 0]
        for panel, name in zip(panels, column, strict=True):
            _dots(panel, groups[name], low, high)
            panel.set_title(name, fontsize=9, loc="left")
            if tuned:
                panel.axvline(_percent(tuned)[0], color="#999999", linestyle="--", linewidth=1, zorder=0)
    figure.supxlabel("validation MAP@R, %; dashed: DRSL by its best recipe", fontsize=9)
    return figure


def _bulk(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Limits of an axis that shows the points, but for those far below all others (Tukey's outer fence)."""
    means = [mean for mean, _ in points]
    first, _, third = quantiles(means, n=4, method="inclusive") if len(means) > 1 else means * 3
    fence = first - 3 * (third - first)
    low = min(mean - deviation for mean, deviation in points if mean >= fence)
    high = max(mean + deviation for mean, deviation in points)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _columns(heights: dict[str, int]) -> list[dict[str, int]]:
    """The panels in order, in two columns of about the same height."""
    half = sum(heights.values()) / 2
    columns: list[dict[str, int]] = [{}, {}]
    for name, height in heights.items():
        left = not columns[1] and sum(columns[0].values()) + height / 2 <= half
        columns[0 if left or not columns[0] else 1][name] = height
    return [column for column in columns if column]


def _dots(panel: Any, points: dict[str, tuple[float, float]], low: float, high: float) -> None:
    for row, (mean, deviation) in enumerate(points.values()):
        if mean >= low:
            panel.errorbar(mean, row, xerr=deviation, fmt="o", color=COLORS[2], capsize=2, markersize=5)
        else:
            panel.plot(low, row, "<", color=COLORS[1], clip_on=False)
            panel.annotate(f"{mean:.1f}", (low, row), (8, 0), textcoords="offset points", va="center", fontsize=8)
    panel.set_xlim(low, high)
    panel.set_yticks(range(len(points)), list(points), fontsize=8)
    panel.set_ylim(len(points) - 0.5, -0.5)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(alpha=0.3)
