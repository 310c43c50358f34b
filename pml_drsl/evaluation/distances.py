"""Query-to-gallery distances, a few rows at a time.

Whoever ranks a gallery asks for the rows of a few queries, uses them and drops them, so the whole
query x gallery matrix never exists. ``FeatureDistances`` makes rows from features;
``pml_drsl.evaluation.reranking.RerankedDistances`` makes re-ranked ones. Both satisfy ``DistanceRows``.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pml_drsl.checks import InputError
from pml_drsl.precision import full_precision

Array: TypeAlias = Tensor | np.ndarray[Any, Any]
Metric = Literal["euclidean", "cosine"]
METRICS: tuple[Metric, ...] = ("euclidean", "cosine")
ELEMENTS_PER_CHUNK = 2**24  # 64 MiB of float32 distances: large enough for fast matrix products


class DistanceRows(Protocol):
    """Distances of ``num_query`` queries to ``num_gallery`` gallery entries, made on demand."""

    @property
    def num_query(self) -> int: ...

    @property
    def num_gallery(self) -> int: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """A new [stop - start, num_gallery] floating tensor that its receiver may overwrite.

        Only the order within a row matters to a ranking: each row may be shifted by its own constant.
        """
        ...


class FeatureDistances:
    """Euclidean or cosine distances between two sets of features.

    Products are made in float32 for float16, bfloat16 and float32 features, and in float64 when either
    set is float64; TensorFloat-32 and autocast are switched off meanwhile. Gallery entries with identical
    features (after normalisation, for ``"cosine"``) have identical distances, bit for bit, so ties between
    them are found; equal distances between different features are found only as far as rounding allows.

    Args:
        query: [Q, D] floating tensor or array, D >= 1.
        gallery: [M, D], likewise.
        metric: ``"euclidean"`` or ``"cosine"`` (1 - cosine similarity; a zero vector is at distance 1).
        device: where to compute; None for the device of ``query``.

    Raises:
        InputError: for an unknown metric, features of a wrong shape or type, no features, NaN or infinite
            features, or features so large that their squares overflow.
    """

    def __init__(
        self, query: Array, gallery: Array, metric: Metric = "euclidean", *, device: torch.device | str | None = None
    ) -> None:
        if metric not in METRICS:
            raise InputError(f"unknown metric {metric!r}: choose one of {', '.join(map(repr, METRICS))}")
        query, gallery = as_features(query, "query"), as_features(gallery, "gallery")
        if query.shape[1] != gallery.shape[1]:
            raise InputError(
                f"query features have {query.shape[1]} dimensions and gallery features {gallery.shape[1]}: "
                "extract both with the same model"
            )
        dtype = torch.float64 if torch.float64 in (query.dtype, gallery.dtype) else torch.float32
        device = query.device if device is None else torch.device(device)
        query, gallery = query.to(device, dtype), gallery.to(device, dtype)
        query_squares, gallery_squares = squared_norms(query, "query"), squared_norms(gallery, "gallery")
        if metric == "cosine":
            query = torch.nn.functional.normalize(query)
            gallery = torch.nn.functional.normalize(gallery)
        self.metric = metric
        self.query = query
        self.gallery = gallery
        self._query_squares = query_squares
        self._gallery_squares = gallery_squares
        self._copies, self._originals = _repeated_rows(gallery)

    @property
    def num_query(self) -> int:
        return len(self.query)

    @property
    def num_gallery(self) -> int:
        return len(self.gallery)

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, M] distances up to a constant per query, which costs least and rounds least.

        Euclidean: ``|g|^2 - 2 q.g``, the squared distance less ``|q|^2``. Cosine: ``-cos(q, g)``.
        """
        query = self.query[start:stop]
        with torch.no_grad(), full_precision(query.device.type):
            if self.metric == "cosine":
                rows = torch.mm(query, self.gallery.T).neg_()
            else:
                rows = torch.addmm(self._gallery_squares, query, self.gallery.T, alpha=-2)
        if len(self._copies) > 0:
            # A matrix product rounds a column by its place in the matrix: copy, so that copies tie exactly.
            rows[:, self._copies] = rows[:, self._originals]
        return rows

    def distances(self, start: int, stop: int) -> Tensor:
        """[stop - start, M] distances themselves, as torchreid gives them: squared Euclidean, or 1 - cosine."""
        rows = self.rows(start, stop)
        if self.metric == "cosine":
            return rows.add_(1)
        return rows.add_(self._query_squares[start:stop, None]).clamp_(min=0)


def rows_per_chunk(num_columns: int, chunk_size: int | None = None) -> int:
    """How many rows of ``num_columns`` to hold at once: ``chunk_size``, or as many as fit in 64 MiB of float32."""
    if chunk_size is None:
        return max(1, ELEMENTS_PER_CHUNK // max(1, num_columns))
    if chunk_size < 1:
        raise InputError(f"chunk_size={chunk_size}: give a positive number of queries, or None to choose it")
    return chunk_size


def as_features(features: Array, name: str) -> Tensor:
    """Features as a detached tensor. Raises InputError unless they are floating [N, D], N and D at least 1."""
    try:
        tensor = torch.as_tensor(features).detach()
    except (TypeError, ValueError) as error:  # text, objects, foreign byte order, ...
        kind = getattr(features, "dtype", type(features).__name__)
        raise InputError(f"{name} features are {kind}: give floating-point features ({error})") from error
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise InputError(f"{name} features have shape {list(tensor.shape)}: give a non-empty [images, dimensions]")
    if not tensor.is_floating_point():
        raise InputError(f"{name} features are {tensor.dtype}: give floating-point features")
    return tensor


def squared_norms(features: Tensor, name: str) -> Tensor:
    """[N] squared norms of [N, D] features. Raises InputError where they, or distances made of them, overflow."""
    with full_precision(features.device.type):
        squares: Tensor = torch.linalg.vecdot(features, features)
    if not bool((4 * squares).isfinite().all()):  # a squared distance is at most four times the larger norm's
        bad = ~features.isfinite().all(dim=1)
        if bool(bad.any()):
            raise InputError(
                f"{int(bad.sum())} of {len(features)} {name} features contain NaN or infinity "
                f"(first: row {int(bad.nonzero()[0])}): look for a diverged model or a half-precision overflow"
            )
        raise InputError(
            f"{name} features reach {float(features.abs().max()):.3g}, whose squares overflow {features.dtype}: "
            "scale them down or give float64"
        )
    return squares


def _repeated_rows(features: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of [N, D] that repeat an earlier row, and the first row that each one repeats: two [R] index tensors."""
    integer = torch.int64 if features.dtype == torch.float64 else torch.int32
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (features.shape[1],), generator=generator).to(features.device)
    step = max(1, 2**18 // features.shape[1])  # the integers stay in the processor's cache
    count, device = len(features), features.device
    # Adding 0 turns -0.0 into 0.0. A hash may collide, so equality is checked below.
    hashes = torch.cat(
        [((features[i : i + step] + 0.0).view(integer) * weights).sum(dim=1) for i in range(0, count, step)]
    )
    hashes, order = hashes.sort(stable=True)
    starts_group = torch.ones(count, dtype=torch.bool, device=device)
    starts_group[1:] = hashes[1:] != hashes[:-1]
    start = torch.where(starts_group, torch.arange(count, device=device), 0).cummax(dim=0).values
    copies, originals = order[~starts_group], order[start[~starts_group]]
    same = torch.ones(len(copies), dtype=torch.bool, device=device)
    for i in range(0, len(copies), step):
        same[i : i + step] = (features[copies[i : i + step]] == features[originals[i : i + step]]).all(dim=1)
    return copies[same], originals[same]
