"""Shows why a search fails: its hardest queries, pairs of cameras, distances, and a map of the gallery, on one page."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from pml_drsl.checks import InputError
from pml_drsl.evaluation import Metric
from pml_drsl.evaluation.arrays import Junk, label_array, number_cameras, number_identities
from pml_drsl.evaluation.distances import as_features, rows_per_chunk
from pml_drsl.evaluation.scores import RankedQueries
from torchreid_ext.evaluation.extraction import Samples
from torchreid_ext.evaluation.page import UNITS, Picture, shown_distance, write_pages
from torchreid_ext.evaluation.ranking import Pictures, Search, hardest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray[Any, Any]

HARDEST, TOPK = 50, 10  # queries on the page, and gallery entries of each query
MOST_CAMERAS = 40  # More have no table: so many are images without a camera, each with a camera of its own.
STEPS, BARS = 10_000, 100  # steps in which distances are counted, and bars in which they are drawn
# matplotlib's colours for people on the map, but for its grey, and marks for readers to whom they look alike: the
# letter of matplotlib, and the sign of the legend.
MARKS = {
    "#1f77b4": ("o", "●"), "#ff7f0e": ("s", "■"), "#2ca02c": ("^", "▲"), "#d62728": ("v", "▼"), "#9467bd": ("D", "◆"),
    "#8c564b": ("P", "✚"), "#e377c2": ("X", "✘"), "lime": ("*", "★"), "#bcbd22": ("<", "◄"), "#17becf": (">", "►"),
}  # fmt: skip
SIDES = ("query", "gallery")


def count_distances(search: Search) -> tuple[Array, Array, Array]:
    """How many pairs of a query and a gallery entry have a distance in each of ``STEPS`` equal steps, without junk: the
    edges of the steps, shape (STEPS + 1,), and the numbers of positive and of negative pairs, int64 of shape (STEPS,).
    The distances are counted a few queries at a time, because Market-1501 has 66 million of them."""
    size, step = len(search.query.pids), rows_per_chunk(len(search.gallery.pids))
    chunks = [(start, min(start + step, size)) for start in range(0, size, step)]
    distances, counts = search.distances.distances, np.zeros((2, STEPS), np.int64)
    top = max(float(distances(*chunk).max()) for chunk in chunks) or 1.0  # Distances that are all 0 have a range too.
    for chunk in chunks:
        rows, (right, junk) = distances(*chunk).cpu().numpy(), search.masks(*chunk)
        for count, mask in zip(counts, (right, ~(right | junk)), strict=True):
            count += np.histogram(rows[mask], STEPS, (0, top))[0]
    return np.linspace(0, top, STEPS + 1), counts[0], counts[1]


def equal_error(edges: Array, positive: Array, negative: Array) -> tuple[float, float]:
    """The equal error rate, in [0, 1], and its threshold, where the share of negative pairs that are nearer (false
    accepts) is that of positive pairs that are farther (false rejects), as nearly as the steps allow."""
    accepted, nearer = (np.r_[0, of.cumsum()] / max(1, of.sum()) for of in (negative, positive))
    rejected = 1 - nearer
    place = np.abs(accepted - rejected).argmin()
    return float(accepted[place] + rejected[place]) / 2, float(edges[place])


def camera_pairs(search: Search) -> dict[tuple[int, int], tuple[float, int]]:
    """mAP, and the number of queries scored, by the camera of the queries and the only camera of the gallery. A pair of
    cameras without a match is left out."""
    pairs = {}
    for camera in np.unique(search.gallery.camids):
        part = search.gallery.at(np.flatnonzero(search.gallery.camids == camera))
        with contextlib.suppress(InputError):  # No query has a match in this camera.
            precision = Search(search.query, part, search.metric).evaluate().ranked.average_precision.numpy()
            for other in np.unique(search.query.camids):
                found = precision[(search.query.camids == other) & ~np.isnan(precision)]
                if len(found):
                    pairs[int(other), int(camera)] = float(found.mean()), len(found)
    return pairs


def prepare(data: Mapping[str, Any], paths: Sequence[Any], metric: Metric, junk: Junk) -> tuple[Search, Pictures]:
    """The search and its pictures, without images of junk identities, which have no effect.

    ``data`` holds the arguments of ``pml_drsl.evaluation.scores.evaluate``: features, identities and perhaps cameras.
    ``paths`` are the image files of query and gallery, or None if not known. Raises InputError as ``evaluate``."""
    features = [as_features(data[side], side).cpu() for side in SIDES]
    sizes = len(features[0]), len(features[1])
    pids = number_identities(data["query_ids"], data["gallery_ids"], *sizes, junk)
    # Without cameras, no entry is from its query's camera.
    without = torch.zeros(sizes[0]).long(), torch.ones(sizes[1]).long()
    cams = number_cameras(data.get("query_cams"), data.get("gallery_cams"), *sizes) or without
    samples, pictures = list[Samples](), list[list[Picture]]()
    for side, given, size, pid, cam, files in zip(SIDES, features, sizes, pids, cams, paths, strict=True):
        kept = np.flatnonzero(pid >= 0)
        samples.append(Samples(given, pid.numpy(), cam.numpy()).at(kept))
        labels = (data.get(f"{side}_{kind}") for kind in ("ids", "cams"))
        ids, cameras = (label_array([""] * size if each is None else each) for each in labels)
        names = files if np.shape(files) == (size,) else [f"{side} {row}" for row in range(size)]
        about = ([str(of[row]) for of in (names, ids, cameras)] for row in kept.tolist())
        # drsl-extract gives an image of an unknown camera its path for a camera of its own.
        pictures.append([Picture(path, pid, camera * (camera != path)) for path, pid, camera in about])
    return Search(samples[0], samples[1], metric), (pictures[0], pictures[1])


def write_page(path: str | Path, search: Search, pictures: Pictures, title: str) -> str:
    """Writes the page, and returns the caption that it has below its title. Raises InputError if no query has a match,
    and OSError if the page cannot be written."""
    result = search.evaluate()
    counts = count_distances(search)
    rankings = hardest(search, result.ranked, pictures, TOPK, HARDEST)
    scores = ", ".join(f"{name} {value:.1%}" for name, value in result.scores([1]).items())
    shown = {picture.path for row in rankings for picture in (row.query, *(found.picture for found in row.matches))}
    missing = sum(not os.path.isfile(path) for path in shown)
    caption = (
        f"{scores}, equal error rate {equal_error(*counts)[0]:.1%}. The {len(rankings)} hardest of {result.num_query} "
        f"queries, by rising average precision, each with its {TOPK} nearest of {result.num_gallery} gallery images "
        "and its first match"
    )
    caption += f". {missing} of the {len(shown)} images cannot be found" if missing else ""
    parts = _distances(counts, UNITS[search.metric]), _map(search, pictures, result.ranked), _cameras(search, pictures)
    write_pages(path, rankings, f"{caption}.", title, f'<aside aria-label="Overview">{"".join(parts)}</aside>')
    return caption


def _distances(counts: tuple[Array, Array, Array], unit: str) -> str:
    (edges, positive, negative), (rate, threshold) = counts, equal_error(*counts)
    at = f"At {unit} {shown_distance(threshold)}"
    about = f"{at} as many matches are farther as others are nearer: {rate:.1%} of each."

    def draw(axes: Axes) -> None:
        bars = edges[:: STEPS // BARS]
        styles = (("matches", positive, "#159c74", "-"), ("other people", negative, "#e0525f", "--"))
        for name, steps, colour, line in styles:
            shares = 100 * steps.reshape(BARS, -1).sum(axis=1) / max(1, steps.sum())
            axes.stairs(shares, bars, fill=True, color=colour, alpha=0.25)
            axes.stairs(shares, bars, color=colour, linestyle=line, label=f"{name} ({steps.sum():,} pairs)")
        axes.axvline(threshold, color="gray", linewidth=1, label=f"equal error {rate:.1%}")
        axes.set(xlabel=unit, ylabel="share of pairs (%)", xlim=(0, edges[-1]))
        axes.legend(framealpha=0)

    return _drawn(draw, "Distances", f"{about} Distances are counted in {STEPS:,} steps of {edges[1]:.2g}.")


def _map(search: Search, pictures: Pictures, ranked: RankedQueries) -> str:
    from sklearn.decomposition import PCA

    pids, matched, precision = search.query.pids, ranked.matched.numpy(), ranked.average_precision.numpy()
    means = {pid: precision[matched & (pids == pid)].mean() for pid in np.unique(pids[matched])}
    cosine, sides = search.metric == "cosine", (search.query, search.gallery)
    query, gallery = ((F.normalize(side.features) if cosine else side.features).numpy() for side in sides)
    with np.errstate(all="ignore"):  # Equal features have no variance.
        plane = PCA(min(2, *gallery.shape), random_state=0).fit(gallery)
    # One component is a line on the plane.
    places = [np.c_[plane.transform(features), np.zeros(len(features))][:, :2] for features in (query, gallery)]

    worst = [*zip(sorted(means, key=means.__getitem__), MARKS.items(), strict=False)]

    def draw(axes: Axes) -> None:
        axes.scatter(places[1][:, 0], places[1][:, 1], s=6, color="gray", alpha=0.4, linewidths=0)
        for pid, (colour, (marker, _)) in worst:
            queries, entries = places[0][pids == pid], places[1][search.gallery.pids == pid]
            axes.scatter(queries[:, 0], queries[:, 1], s=80, marker=marker, facecolors="none", edgecolors=colour)
            axes.scatter(entries[:, 0], entries[:, 1], s=25, marker=marker, color=colour)
        axes.set(xticks=[], yticks=[], xlabel="first principal component", ylabel="second principal component")

    # The browser has letters of all languages, where matplotlib has few, and room for long names.
    legend = "".join(
        f'<li><span style="color: {colour}">{sign}</span> {means[pid]:.0%} '
        f"<bdi>{escape(pictures[0][int(np.argmax(pids == pid))].identity)}</bdi></li>"
        for pid, (colour, (_, sign)) in worst
    )
    legend = f'<ul style="margin: 0; padding: 0; list-style: none; overflow-wrap: anywhere">{legend}</ul>'
    kept = np.nan_to_num(plane.explained_variance_ratio_).sum()
    about = f"The gallery on its first two principal components, which hold {kept:.0%} of its variance. In colour: the"
    about = f"{about} people with the lowest mAP, up to ten; large hollow marks are their queries. Grey: all others."
    return _drawn(draw, "Map", about, legend)


def _drawn(draw: Callable[[Axes], None], name: str, about: str, legend: str = "") -> str:
    """A figure of the page, drawn for light and for dark paper, and below it its legend, which is HTML."""
    from matplotlib import style  # matplotlib takes long to import, and only this page needs it.
    from matplotlib.figure import Figure

    images = []
    for paper in ("default", "dark_background"):
        with style.context(paper):
            figure, file = Figure(figsize=(6.2, 4), layout="constrained"), io.BytesIO()
            draw(figure.subplots())
            figure.savefig(file, dpi=160, transparent=True)
        images.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{images[1]}">'
    picture = f'<picture>{dark}<img src="{images[0]}" alt="{escape(f"{name}: {about}")}"></picture>'
    return _framed(picture + legend, name, about)


def _framed(content: str, name: str, about: str) -> str:
    return f"<figure>{content}<figcaption><b>{name}.</b> {escape(about)}</figcaption></figure>\n"


def _numbers_first(camera: tuple[int, str]) -> tuple[float, str]:
    return int(camera[1]) if camera[1].isdecimal() else math.inf, camera[1]


def _cameras(search: Search, pictures: Pictures) -> str:
    """The table of camera pairs, whose colours make it a heat map, of the images whose cameras are known."""
    known = [np.flatnonzero([picture.camera != "" for picture in side]) for side in pictures]
    if not all(map(len, known)):
        return _framed("", "Cameras", "These images have no cameras.")
    search = Search(search.query.at(known[0]), search.gallery.at(known[1]), search.metric)
    names = [[each.camera for each in shown if each.camera] for shown in pictures]
    query, gallery = (
        dict(sorted(zip(side.camids.tolist(), own, strict=True), key=_numbers_first))
        for side, own in zip((search.query, search.gallery), names, strict=True)
    )
    if len(query | gallery) > MOST_CAMERAS:
        return _framed("", "Cameras", f"{len(query | gallery):,} cameras are too many for a table of their pairs.")
    pairs = camera_pairs(search)
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in gallery.values())
    rows = [f"<th>query \\ gallery</th>{heads}</tr>"]
    for camera, name in query.items():
        rows.append(f'<tr><th scope="row">{escape(name)}</th>')
        for score, count in (pairs.get((camera, other), (0, 0)) for other in gallery):
            text = f"{score:.1%}<small>{count}</small>" if count else "-"
            rows.append(f'<td style="--share:{score:.3f}">{text}</td>')
        rows.append("</tr>")
    about = "mAP in the gallery of one camera, by the camera of the query, and below it the number of queries."
    return _framed(f"<table><tr>{''.join(rows)}</table>", "Cameras", about)
