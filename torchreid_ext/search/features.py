"""The features of images: extracted by one process or several, kept in a file, and indexed to find the nearest."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.console import replacing
from pml_drsl.evaluation.arrays import load_arrays
from pml_drsl.evaluation.ranking import share
from torchreid_ext.evaluation.extraction import Samples, gather_samples
from torchreid_ext.evaluation.page import Box
from torchreid_ext.images import Row, composed
from torchreid_ext.runtime import distributed
from torchreid_ext.search.model import Preprocessing, TrainedModel

# For more queries at once, faiss computes |q|^2 - 2 qg + |g|^2, which loses small distances far from the origin.
_ACCURATE_BLOCK = 16
Array = np.ndarray[Any, Any]
_FINGERPRINT = "model_fingerprint"  # beside the arrays of drsl-evaluate, which ignores it


@dataclass(frozen=True)
class ExtractedSet:
    """N images, and their features on the CPU."""

    entries: list[Row]
    features: Tensor  # [N, D]
    damaged: list[str] = field(default_factory=list)  # what was wrong with each image that could not be read


class _Files(Dataset[Any]):
    """Images from files; one that cannot be read is given as the reason why."""

    def __init__(self, paths: Sequence[str], preprocessing: Preprocessing, crop: Box | None) -> None:
        self.paths, self.preprocessing, self.crop = list(paths), preprocessing, crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.preprocessing(self.paths[index], self.crop)
        except InputError as error:
            reason, path = str(error), self.paths[index]
            return index, reason if path in reason else f"{path!r}: {reason}"


def _collated(batch: Sequence[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | None, list[str]]:
    """The indices and images of a batch that can be read, and what is wrong with the others. The images are one tensor,
    because every tensor that a loading process sends needs open files, whose number is limited."""
    read = {index: image for index, image in batch if isinstance(image, Tensor)}
    reasons = [image for _, image in batch if isinstance(image, str)]
    return [*read], torch.stack([*read.values()]) if read else None, reasons


def extract_files(
    model: TrainedModel,
    entries: Sequence[Row],
    *,
    batch_size: int | None = None,
    workers: int = 0,
    crop: Box | None = None,
    skip_damaged: bool = False,
    may_be_empty: bool = False,
    description: str = "features",
) -> ExtractedSet:
    """The features of one or more image files, the ``entries`` that can be read, in their order.

    Inside ``distributed.joined``, each process extracts a share of the batches, and every process has all features.

    Args:
        batch_size: images in a batch; None for ``test.batch_size`` of the model's configuration.
        workers: loading processes, >= 0; a single batch needs none.
        crop: left, top, right and bottom in pixels of the part of each image to use.
        skip_damaged: leave out an image that cannot be read, instead of raising an InputError.
        may_be_empty: return no features, instead of raising an InputError, where none can be read.
        description: what stands before the progress bar.

    An InputError refuses numbers out of their range, and images of which none can be read."""
    size = int(model.config.test.batch_size) if batch_size is None else batch_size
    if size < 1 or workers < 0:
        raise InputError(f"batch size {size} and workers {workers}: give 1 or more and 0 or more")
    batches = [list(range(start, min(start + size, len(entries)))) for start in range(0, len(entries), size)]
    group = distributed.group()
    if group is not None:
        batches = batches[share(len(batches), group)]
    files = _Files([entry.path for entry in entries], Preprocessing(model.config), crop)
    workers = min(workers, len(batches)) if len(batches) > 1 else 0
    loader = DataLoader(files, batch_sampler=batches, num_workers=workers, collate_fn=_collated)
    damaged: list[str] = []

    def extract() -> Samples | None:
        """The features with the positions of their images in place of identities and cameras."""
        parts, kept = list[Tensor](), list[int]()
        for indices, images, reasons in tqdm(loader, desc=description, leave=False, disable=None):
            if reasons and not skip_damaged:
                raise InputError(f"{reasons[0]}; --skip-damaged leaves such images out")
            damaged.extend(reasons)
            if images is not None:
                parts.append(model.features(images))
                kept += indices
        return Samples(torch.cat(parts), np.array(kept), np.array(kept)) if parts else None

    found = extract() if group is None else gather_samples(extract, model.device, group)
    damaged = [reason for reasons in distributed.gathered(damaged) for reason in reasons]
    if found is None and may_be_empty:
        return ExtractedSet([], torch.empty(0, 0), damaged)
    if found is None:
        raise InputError(f"none of the {len(entries)} images can be read, for example: {damaged[0]}")
    return ExtractedSet([entries[index] for index in found.pids], found.features, damaged)


def write_features(path: str | os.PathLike[str], model: TrainedModel, sets: dict[str, ExtractedSet]) -> bool:
    """Writes features of ``"query"``, ``"gallery"`` or both in ``drsl-evaluate``'s .npz format, whole or not at all,
    with the distance by which the run was tested.

    Identities are written where those of all images are known, and with them cameras, if one is known: an image whose
    camera is not known has its path for a camera of its own. Returns whether ``drsl-evaluate`` can compute scores:
    there are both sets, and all identities are known."""
    rows = [row for extracted in sets.values() for row in extracted.entries]
    arrays: dict[str, Any] = {_FINGERPRINT: np.array(model.fingerprint), "metric": np.array(model.metric)}
    for name, extracted in sets.items():
        paths = [os.path.abspath(row.path) for row in extracted.entries]
        arrays[name], arrays[f"{name}_paths"] = extracted.features.numpy(), np.array(paths)
        if all(row.identity for row in rows):
            arrays[f"{name}_ids"] = np.array([row.identity for row in extracted.entries])
            if any(row.camera for row in rows):
                cameras = (row.camera or path for row, path in zip(extracted.entries, paths, strict=True))
                arrays[f"{name}_cams"] = np.array([*cameras])
    with replacing(path) as file:
        np.savez(file, **arrays)
    return {"query_ids", "gallery_ids"} <= set(arrays)


def read_gallery(path: str | os.PathLike[str], model: TrainedModel) -> ExtractedSet:
    """The gallery of a file that :func:`write_features` wrote. Raises InputError for a file that is damaged, of another
    format, without a gallery or of another model, and OSError for a file that cannot be opened."""
    arrays = load_arrays(path)
    if missing := [name for name in (_FINGERPRINT, "gallery", "gallery_paths") if name not in arrays]:
        raise InputError(f"{os.fspath(path)!r} lacks {', '.join(missing)}: give a file of a gallery from drsl-extract")
    if str(arrays[_FINGERPRINT]) != model.fingerprint:
        other = f"{os.fspath(path)!r} holds features of another model than {model.path!r}"
        raise InputError(f"{other}, which cannot be compared: extract them again with this checkpoint")
    features, paths = arrays["gallery"], arrays["gallery_paths"]
    columns = [paths, *(arrays.get(f"gallery_{name}", np.full(paths.shape, "")) for name in ("ids", "cams"))]
    if features.ndim != 2 or features.dtype.kind != "f" or any(part.shape != features.shape[:1] for part in columns):
        wanted = "[images, dimensions] numbers, and its paths, identities and cameras one value for each image"
        raise InputError(f"{os.fspath(path)!r}: gallery must hold {wanted}; extract them again")
    rows = (Row(*map(str, row)) for row in zip(*columns, strict=True))
    entries = [
        Row(row.path, composed(row.identity), "" if row.camera == row.path else composed(row.camera)) for row in rows
    ]
    return ExtractedSet(entries, torch.from_numpy(features.astype(np.float32)))


class FeatureIndex:
    """The features of N images, of ``dim`` dimensions, in rows, and faiss's index of them, by ``"euclidean"`` distance,
    squared, or ``"cosine"``, 1 - similarity. It is exact. Only searches may run in several threads at once."""

    def __init__(self, dim: int, metric: str) -> None:
        self.dim, self.metric = dim, metric
        # Not imported with the package: torch and faiss each bring a copy of OpenMP, which collide on macOS.
        self._faiss = importlib.import_module("faiss")
        # Features of unit norm have twice the cosine distance as squared Euclidean distance.
        self._index = self._faiss.IndexFlatL2(dim)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, features: Tensor, normalised: bool = False) -> None:
        """Adds [N, D] features below the rows that are there; ``normalised`` ones have the metric's norm already.
        Raises InputError for features that are not finite."""
        self._index.add(self._vectors(features, normalised))

    def remove(self, rows: Sequence[int]) -> None:
        """Removes rows; the rows below move up."""
        self._index.remove_ids(np.array(rows, dtype=np.int64))

    def features(self) -> Tensor:
        """[N, D] features; of unit norm where the metric is cosine."""
        # pytorch-metric-learning makes faiss return tensors in the place of arrays.
        return torch.as_tensor(self._index.reconstruct_n(0, len(self)))

    def search(self, queries: Tensor, top: int) -> tuple[Array, Array]:
        """The rows and the distances, [Q, top] or as many as there are, of the nearest of Q queries, [Q, D]. Raises
        InputError for queries that are not finite."""
        vectors, top = self._vectors(queries), min(top, len(self))
        block = len(vectors) if self.metric == "cosine" else _ACCURATE_BLOCK
        parts = [self._index.search(vectors[at : at + block], top) for at in range(0, len(vectors), max(block, 1))]
        found, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
        return rows, np.maximum(found, 0) / (2 if self.metric == "cosine" else 1)

    def _vectors(self, features: Tensor, normalised: bool = False) -> Array:
        as_given = normalised or self.metric != "cosine"
        vectors = features.float() if as_given else F.normalize(features.float())
        if not torch.isfinite(vectors).all():
            raise InputError("features must be finite, and some are NaN or infinite")
        return np.ascontiguousarray(vectors.numpy())
