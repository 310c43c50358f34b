"""The results as pictures, readable at the width of a page and by the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pml_drsl.benchmark import ablation, imbalance, tables
from pml_drsl.benchmark.candidates import CANDIDATES, CROSS_ENTROPY, DRSL
from pml_drsl.benchmark.results import Protocol, Results
from pml_drsl.benchmark.speed_report import COLORS, MARKERS
from pml_drsl.benchmark.tuning import ALONE, BEST, reported

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
        loss: {name: scores for name, trial in recipes.items() if (scores := tables.values(results, trial))}
        for loss in CANDIDATES
        if (recipes := reported(results, protocol, loss))
    }
    ranked = sorted((loss for loss in found if found[loss]), key=lambda loss: max(map(fmean, found[loss].values())))
    figure = _figure(8, 1.5 + 0.3 * len(ranked))
    panel = figure.subplots()
    for name, (marker, color) in STYLES.items():
        rows = [row for row, loss in enumerate(ranked) if name in found[loss]]
        points = [_percent(found[ranked[row]][name]) for row in rows]
        panel.errorbar(
            [mean for mean, _ in points],
            [row + {ALONE: -0.15, CROSS_ENTROPY: 0.0, BEST: 0.15}[name] for row in rows],
            xerr=[deviation for _, deviation in points],
            fmt=marker,
            color=color,
            capsize=2,
            markersize=5,
            label={CROSS_ENTROPY: "with cross-entropy"}.get(name, name),
        )
    panel.set_yticks(range(len(ranked)), ranked)
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == DRSL else "normal")
    panel.set_xlabel("test MAP@R, %: mean and standard deviation over the seeds")
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right")
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
            list(points),
            [mean for mean, _ in points.values()],
            yerr=[deviation for _, deviation in points.values()],
            label=loss,
            color=COLORS[index],
            marker=MARKERS[index],
            capsize=2,
            linewidth=2.5 if loss == DRSL else 1.2,
        )
    panel.set_xscale("log")
    panel.set_xticks(imbalance.RATIOS, [f"1:{ratio}" for ratio in imbalance.RATIOS])
    panel.minorticks_off()
    panel.set_xlabel("positives : negatives of a query")
    panel.set_ylabel("test MAP@R, %")
    panel.grid(alpha=0.3)
    panel.legend()
    return figure


def _ablation(results: Results, protocol: Protocol) -> Any:
    found = [
        (change, _percent(scores))
        for change, trial in ablation.trials(results, protocol)
        if (scores := tables.values(results, trial))
    ]
    groups = list(dict.fromkeys(change.group for change, _ in found))
    if not groups:
        return None
    figure = _figure(9, 2 + 0.17 * len(found))
    columns = 2
    panels = figure.subplots(-(-len(groups) // columns), columns, sharex=True, squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.axis("off")
    for panel, group in zip(panels.flat, groups, strict=False):
        of_group = [(change.label, point) for change, point in found if change.group == group]
        panel.errorbar(
            [mean for _, (mean, _) in of_group],
            range(len(of_group)),
            xerr=[deviation for _, (_, deviation) in of_group],
            fmt="o",
            color=COLORS[2],
            capsize=2,
        )
        panel.set_yticks(range(len(of_group)), [label for label, _ in of_group], fontsize=8)
        panel.invert_yaxis()
        panel.set_title(group, fontsize=9)
        panel.grid(alpha=0.3)
    figure.supxlabel("validation MAP@R, %", fontsize=9)
    return figure
