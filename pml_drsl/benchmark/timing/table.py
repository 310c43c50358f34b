"""Writes the results of the speed benchmark as text, Markdown, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from pytorch_metric_learning.losses import SmoothAPLoss
from tabulate import tabulate

from pml_drsl.benchmark.timing.measure import FLOOR, LOSSES, PER_IDENTITY

NAMES = {FLOOR: "distance matrix alone", "DRSL": "DRSL (default)", "DRSL-definition": "DRSL (definition)"}
# The palette of Okabe and Ito is safe for colour-blind readers. Markers distinguish the lines as well.
COLORS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#882255"]
MARKERS = "osDv^P*Xh"


@dataclass(frozen=True)
class Row:
    """One loss at one batch size.

    Attributes:
        loss: the loss's name in ``LOSSES``, or ``"floor"`` for the distance matrix alone.
        size: number of embeddings in the batch.
        dim: number of dimensions of an embedding.
        seconds: median time of forward and backward, or None where the time was not measured.
        ratio: the loss's time divided by the floor's time, median over the rounds.
        peak_bytes: memory that one step adds, or None where the memory was not measured.
        rounds: number of measured rounds.
        note: the reason why a figure is missing, or "".
    """

    loss: str
    size: int
    dim: int
    seconds: float | None
    ratio: float | None
    peak_bytes: int | None
    rounds: int
    note: str = ""


def machine(device: str, threads: int) -> str:
    """One line that describes the machine."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {threads} threads"
    return f"torch {torch.__version__}, {where}, float32, {PER_IDENTITY} embeddings per identity"


def table(rows: Sequence[Row]) -> str:
    """The rows of one batch size as text."""
    lines = [
        f"\n{rows[0].size} embeddings of {rows[0].dim} dimensions",
        f"  {'':22}{'time':>12}{'/ floor':>10}{'/ DRSL':>10}{'memory':>12}",
    ]
    drsl = next((row.ratio for row in rows if row.loss == "DRSL"), None)
    for row in rows:
        against_drsl = None if row.ratio is None or drsl is None else row.ratio / drsl
        lines.append(
            f"  {NAMES.get(row.loss, row.loss):22}{time_text(row.seconds):>12}{ratio_text(row.ratio):>10}"
            f"{ratio_text(against_drsl):>10}{bytes_text(row.peak_bytes):>12}  {row.note}".rstrip()
        )
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table for each number of dimensions: times in multiples of the time of the distance matrix."""
    parts = []
    for dim in dict.fromkeys(row.dim for row in rows):
        losses = list(dict.fromkeys(row.loss for row in rows if row.dim == dim and row.loss != FLOOR))
        cells = {(row.size, row.loss): row for row in rows if row.dim == dim}
        sizes = list(dict.fromkeys(size for size, _ in cells))
        lines = [[f"{size:,}", *(_multiple(cells[size, loss]) for loss in losses)] for size in sizes]
        headers = ["embeddings", *(NAMES.get(loss, loss) for loss in losses)]
        text = tabulate(lines, headers, tablefmt="pipe", colalign=["right"] * len(headers), disable_numparse=True)
        parts.append(f"{dim:,} dimensions, times of the distance matrix alone:\n\n{text}\n")
    return "\n".join(parts)


def _multiple(row: Row) -> str:
    if row.ratio is None:
        return row.note.partition(" in ")[0].partition(":")[0] or "-"
    return f"{row.ratio:.2f}" if row.ratio < 10 else f"{row.ratio:,.0f}"


def growth(rows: Sequence[Row]) -> str:
    """The growth of DRSL's time when the batch size doubles, as text; "" without two such sizes."""
    lines = ["\nDRSL's time when the number of embeddings doubles (4 times is the distance matrix's own growth):"]
    times = {(row.dim, row.size): row.seconds for row in rows if row.loss == "DRSL" and row.seconds is not None}
    for (dim, size), seconds in times.items():
        if (dim, 2 * size) in times:
            lines.append(f"  {dim} dimensions, {size} -> {2 * size}: {times[dim, 2 * size] / seconds:.2f} times")
    return "\n".join(lines) if len(lines) > 1 else ""


def smooth_ap_note() -> str:
    """A note on the batches for which PML's SmoothAPLoss is not Smooth-AP, with an example computed now."""
    x, y = torch.eye(8).repeat_interleave(2, 0), torch.arange(8).repeat_interleave(2)
    return (
        f"""
SmoothAP is pytorch-metric-learning's SmoothAPLoss. It is the loss of Brown et al. only where the number of classes
equals the items per class and the batch is sorted by class (here: {PER_IDENTITY**2} embeddings).
Elsewhere it mixes classes up, and the figures above are not of Smooth-AP. Perfectly separated classes must score 0:
  >>> x, y = torch.eye(8).repeat_interleave(2, 0), torch.arange(8).repeat_interleave(2)
  >>> SmoothAPLoss()(x, y).item()
  """
        f"{SmoothAPLoss()(x, y).item():.4f}"
    )


def write_json(path: str, rows: Sequence[Any], device: str, threads: int) -> None:
    with open(path, "w") as file:
        json.dump({"machine": machine(device, threads), "rows": [asdict(row) for row in rows]}, file, indent=1)


def write_csv(path: str, rows: Sequence[Any]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def plotter() -> Callable[[str, Sequence[Row]], None]:
    """The function that draws the plot.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def plot(path: str, rows: Sequence[Row]) -> None:
        dims = sorted({row.dim for row in rows})
        figure = Figure(figsize=(5.5 * len(dims) + 1.5, 8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(dims), squeeze=False, sharex=True, sharey="row")
        for (top, bottom), dim in zip(axes.T, dims, strict=True):
            for index, name in enumerate([FLOOR, *LOSSES]):
                style: dict[str, Any] = {
                    "color": COLORS[index],
                    "marker": MARKERS[index],
                    "label": NAMES.get(name, name),
                }
                style["linewidth"] = 2.5 if name == "DRSL" else 1.2
                of_loss = [row for row in rows if row.dim == dim and row.loss == name and row.seconds is not None]
                if not of_loss:
                    continue
                sizes = [row.size for row in of_loss]
                top.loglog(sizes, [1e3 * (row.seconds or 0) for row in of_loss], base=10, **style)
                memory = [(row.size, row.peak_bytes / 2**20) for row in of_loss if row.peak_bytes]
                if memory:
                    bottom.loglog(*zip(*memory, strict=True), **style)
            top.set_title(f"{dim} dimensions")
            bottom.set_xlabel("embeddings in the batch")
            sizes = sorted({row.size for row in rows})
            bottom.set_xscale("log", base=2)
            bottom.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes[0, 0].set_ylabel("forward + backward, ms")
        axes[1, 0].set_ylabel("peak memory, MiB")
        for panel in axes.flat:
            panel.grid(alpha=0.3)
        lines = {line.get_label(): line for panel in axes[0] for line in panel.get_lines()}
        figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False)
        figure.savefig(path, dpi=120)

    return plot


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def bytes_text(number: int | None) -> str:
    if number is None:
        return "-"
    return f"{number / 2**20:.1f} MiB" if number < 2**30 else f"{number / 2**30:.2f} GiB"
