"""Distances from queries to a gallery, a few rows at a time, so that the whole matrix never exists."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pml_drsl.checks import InputError
from pml_drsl.evaluation import METRICS, Metric
from pml_drsl.evaluation.arrays import Array
from pml_drsl.machine import full_precision

ELEMENTS_PER_CHUNK = 2**24  # 64 MiB of float32 distances are enough for fast matrix products.


class FeatureDistances:
    """Euclidean or cosine distances between two sets of features.

    Distances are computed in float64 if either side is float64, and in float32 otherwise, in full precision. Gallery
    entries with identical features (for ``"cosine"``: after normalisation) have identical distances, bit for bit, so
    that ties between them are found. Between different features, rounding can hide a tie.

    The cosine distance ``1 - q.g / (|q| |g|)`` is half the squared distance of the normalised features, so that both
    metrics come from ``|g|^2 / 2 - q.g``, of features centred by ``_center``.

    Args:
        query, gallery: floating-point tensors or arrays of shapes (Q, D) and (M, D), with D at least 1. No features at
            all, NaN, infinity, squares that overflow or all underflow, and other shapes or types are an InputError.
        metric: ``"euclidean"``, or ``"cosine"`` for 1 - cosine similarity. A zero vector has cosine distance 1.
        device: where to compute; None for the device of ``query``. In place of a Mac's GPU it is the CPU.
    """

    def __init__(
        self, query: Array, gallery: Array, metric: Metric = "euclidean", *, device: torch.device | str | None = None
    ) -> None:
        check_option("metric", metric, METRICS)
        query, gallery = as_features(query, "query"), as_features(gallery, "gallery")
        if query.shape[1] != gallery.shape[1]:
            given = f"query features have {query.shape[1]} dimensions and gallery features {gallery.shape[1]}"
            raise InputError(f"{given}: extract both with the same model")
        dtype = torch.float64 if torch.float64 in (query.dtype, gallery.dtype) else torch.float32
        device = query.device if device is None else torch.device(device)
        device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        query, gallery = query.to(device, dtype), gallery.to(device, dtype)
        self.num_query, self.num_gallery = len(query), len(gallery)
        for features, name in ((query, "query"), (gallery, "gallery")):
            if not bool(squared_norms(features, name).any()) and bool(features.any()):
                given = f"{name} features reach {float(features.abs().max()):.3g}, whose squares are 0 in {dtype}"
                raise InputError(f"{given}: scale all features up or give float64")
        if metric == "cosine":
            query, gallery = torch.nn.functional.normalize(query), torch.nn.functional.normalize(gallery)
        self._query_lifts, self._gallery_lifts = (_lift(features, metric) for features in (query, gallery))
        center = _center(gallery)
        if center is not None:
            query, gallery = query - center, gallery - center
        self.metric, self.query, self.gallery = metric, query, gallery
        self._query_halves = squared_norms(query, "query") / 2 + self._query_lifts
        self._gallery_halves = squared_norms(gallery, "gallery") / 2 + self._gallery_lifts
        self._copies, self._originals = _repeated_rows(gallery)

    def rows(self, start: int, stop: int) -> Tensor:
        """Half squared distances minus a constant for each query, ``|g|^2 / 2 - q.g``, shape (stop - start, M), in a
        new tensor: faster, with less rounding, and only the order within a row matters."""
        query = self.query[start:stop]
        with torch.no_grad(), full_precision(query.device.type):
            rows = torch.addmm(self._gallery_halves, query, self.gallery.T, alpha=-1)
        if len(self._copies) > 0:  # A matrix product may round equal columns differently.
            rows[:, self._copies] = rows[:, self._originals]
        return rows

    def distances(self, start: int, stop: int) -> Tensor:
        """Distances as torchreid defines them, shape (stop - start, M): squared Euclidean, or 1 - cosine."""
        return self._of_halves(self.rows(start, stop).add_(self._query_halves[start:stop, None]))

    def of_pairs(self, queries: Tensor, entries: Tensor) -> Tensor:
        """The distances of pairs of a query and a gallery entry, int64 of shape (P,), as ``distances``, on the CPU."""
        step, parts = rows_per_chunk(self.query.shape[1]), []
        for left, right in zip(queries.split(step), entries.split(step), strict=True):
            halves = self.query[left].sub_(self.gallery[right]).square_().sum(dim=1).div_(2)
            halves += self._query_lifts[left] + self._gallery_lifts[right]
            parts.append(self._of_halves(halves).cpu())
        return torch.cat(parts)

    def _of_halves(self, halves: Tensor) -> Tensor:
        """Distances from half squared distances, which it overwrites. Rounding can make a distance of 0 negative."""
        return halves.mul_(1 if self.metric == "cosine" else 2).clamp_(min=0)


def _lift(features: Tensor, metric: Metric) -> Tensor:
    """What to add to half squared distances, shape (N,): 1/2 for zero vectors, of cosine distance 1, otherwise 0."""
    if metric != "cosine":
        return features.new_zeros(len(features))
    halves = squared_norms(features, "normalised") / 2
    # Vectors whose norm is below the smallest divisor of ``normalize`` stay shorter than 1.
    return torch.where(halves < 0.25, 0.5 - halves, 0)


def _center(gallery: Tensor) -> Tensor | None:
    """A point near the mean of the gallery, or None if zero is: far from zero, ``|g|^2 / 2 - q.g`` loses digits.
    Rounding to about the spread, a power of two, keeps features of few digits so, and their equal distances equal."""
    # Without images of unusual size: one that is very long would move the point far from all others.
    norms = torch.linalg.vector_norm(gallery, dim=1)
    usual = norms <= 2 * norms.median()
    with full_precision(gallery.device.type):
        mean = (usual / usual.sum()).to(gallery) @ gallery
    parts = gallery.split(rows_per_chunk(gallery.shape[1]))
    # In float64, because squares of large features overflow in float32.
    norms = torch.cat([torch.linalg.vector_norm(part - mean, dim=1, dtype=torch.float64) for part in parts])[usual]
    spread = float(torch.linalg.vector_norm(norms)) / math.sqrt(len(norms) * gallery.shape[1])
    if spread < torch.finfo(gallery.dtype).tiny:
        return None
    unit = 2.0 ** math.ceil(math.log2(spread))
    center = mean.div_(unit).round_().mul_(unit)
    return center if bool(center.any()) else None


def check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, allowed))}")


def rows_per_chunk(num_columns: int) -> int:
    """The number of rows to compute at once: 64 MiB of float32, and at least one row."""
    return max(1, ELEMENTS_PER_CHUNK // max(1, num_columns))


def as_features(features: Array, name: str) -> Tensor:
    """Features as a detached floating-point tensor of shape (N, D), N and D at least 1; anything else: InputError."""
    if isinstance(features, np.ndarray) and min(features.strides, default=0) < 0:
        features = features.copy()  # torch takes no reversed array
    try:
        # ``as_tensor`` would move a tensor to the default device.
        tensor = features.detach() if isinstance(features, Tensor) else torch.as_tensor(features, device="cpu")
    except (TypeError, ValueError) as error:  # Text, objects or a foreign byte order.
        kind = getattr(features, "dtype", type(features).__name__)
        raise InputError(f"{name} features are {kind}: give floating-point features ({error})") from error
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise InputError(f"{name} features have shape {list(tensor.shape)}: give a non-empty [images, dimensions]")
    if not tensor.is_floating_point():
        raise InputError(f"{name} features are {tensor.dtype}: give floating-point features")
    return tensor


def squared_norms(features: Tensor, name: str) -> Tensor:
    """Squared norms of features, shape (N,). An InputError if they are not finite, or squared distances overflow."""
    parts = features.split(rows_per_chunk(features.shape[1]))
    with full_precision(features.device.type):  # The products of all rows at once would be another copy of them.
        squares = torch.cat([torch.linalg.vecdot(part, part) for part in parts])
    if not bool((4 * squares).isfinite().all()):  # A squared distance is at most four times the larger squared norm.
        bad = (~features.isfinite().all(dim=1)).nonzero()
        if len(bad):
            given = f"{len(bad)} of {len(features)} {name} features contain NaN or infinity (first: row {int(bad[0])})"
            raise InputError(f"{given}: look for a diverged model or a half-precision overflow")
        given = f"{name} features reach {float(features.abs().max()):.3g}, whose squares overflow {features.dtype}"
        raise InputError(f"{given}: scale them down or give float64")
    return squares


def _repeated_rows(features: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that repeat an earlier row, and the first row like each. ``torch.unique`` would copy all three times."""
    integer = torch.int64 if features.dtype == torch.float64 else torch.int32
    generator, dim = torch.Generator().manual_seed(0), features.shape[1]
    weights = torch.randint(-(2**62), 2**62, (dim,), generator=generator, device="cpu").to(features.device)
    step = max(1, 2**18 // dim)  # The integers of one step stay in the processor's cache.
    # Adding 0 turns -0.0 into 0.0.
    hashes = torch.cat([((part + 0.0).view(integer) * weights).sum(dim=1) for part in features.split(step)])
    group = torch.unique(hashes, return_inverse=True)[1]
    rows = torch.arange(len(features), device=features.device)
    first = torch.full_like(rows, len(features)).scatter_reduce_(0, group, rows, "amin")[group]
    copies = (first != rows).nonzero().squeeze(1)
    pairs = zip(copies.split(step), first[copies].split(step), strict=True)  # Different rows may have equal hashes.
    same = torch.cat([(features[copy] == features[original]).all(dim=1) for copy, original in pairs])
    return copies[same], first[copies][same]
