"""Extracts the features of a list of images, by several processes together if there are, and keeps them in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.evaluation.arrays import load_arrays
from pml_drsl.evaluation.ranking import share
from torchreid_ext.evaluation.extraction import Samples, gather_samples
from torchreid_ext.images import Row
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime.files import replacing
from torchreid_ext.search.model import TrainedModel
from torchreid_ext.search.preprocessing import Preprocessing

# Beside the arrays of drsl-evaluate, which ignores these.
_FINGERPRINT, _PATHS = "model_fingerprint", "{}_paths"


@dataclass(frozen=True)
class Features:
    """Features of those images of a list that could be read.

    Attributes:
        features: [N, D] features on the CPU, in the order of the list.
        kept: [N] positions of the images in the list.
        damaged: what was wrong with each of the other images, which are named.
    """

    features: Tensor
    kept: list[int]
    damaged: list[str]


class _Files(Dataset[Any]):
    """Images from files; one that cannot be read is given as the reason why."""

    def __init__(self, paths: Sequence[str], preprocessing: Preprocessing) -> None:
        self.paths, self.preprocessing = list(paths), preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.preprocessing(self.paths[index])
        except InputError as error:
            return index, str(error)


def extract_files(
    model: TrainedModel,
    paths: Sequence[str],
    *,
    batch_size: int | None = None,
    workers: int = 0,
    skip_damaged: bool = False,
    description: str = "features",
) -> Features:
    """The features of image files.

    In a run of several processes that torchrun started, inside ``distributed.joined``, each process extracts a share of
    the batches, and every process has all features.

    Args:
        model: the model.
        paths: the files; one or more.
        batch_size: images in a batch; None for ``test.batch_size`` of the model's configuration.
        workers: loading processes, >= 0.
        skip_damaged: leave out an image that cannot be read, instead of raising an error.
        description: what stands before the progress bar.

    Raises:
        InputError: for a number out of its range, an image that cannot be read, or no image that can be read.
    """
    size = int(model.config.test.batch_size) if batch_size is None else batch_size
    if size < 1 or workers < 0:
        raise InputError(f"batch size {size} and workers {workers}: give 1 or more and 0 or more")
    batches = [list(range(start, min(start + size, len(paths)))) for start in range(0, len(paths), size)]
    group = distributed.group()
    if group is not None:
        batches = batches[share(len(batches), group)]
    files = _Files(paths, Preprocessing(model))
    loader = DataLoader(files, batch_sampler=batches, num_workers=min(workers, len(batches)), collate_fn=list)
    damaged: list[str] = []

    def extract() -> Samples | None:
        return _extract(model, tqdm(loader, desc=description, leave=False, disable=None), skip_damaged, damaged)

    if group is None:
        found = extract()
    else:
        found = gather_samples(extract, model.device, group)
        told: list[Any] = [None] * distributed.size()
        torch.distributed.all_gather_object(told, damaged, group)
        damaged = [reason for reasons in told for reason in reasons]
    if found is None:
        raise InputError(f"none of the {len(paths)} images can be read, for example: {damaged[0]}")
    return Features(found.features, found.pids.tolist(), damaged)


def _extract(
    model: TrainedModel, batches: Iterable[list[tuple[int, Tensor | str]]], skip_damaged: bool, damaged: list[str]
) -> Samples | None:
    """The features of the images of some batches, with their positions in place of identities and cameras."""
    parts, kept = [], list[int]()
    for batch in batches:
        read = [(index, image) for index, image in batch if isinstance(image, Tensor)]
        reasons = [image for _, image in batch if isinstance(image, str)]
        if reasons and not skip_damaged:
            raise InputError(f"{reasons[0]}, or leave such images out with --skip-damaged")
        damaged.extend(reasons)
        if read:
            parts.append(model.features(torch.stack([image for _, image in read])))
            kept += [index for index, _ in read]
    if not parts:
        return None
    return Samples(torch.cat(parts), np.array(kept), np.array(kept))


@dataclass(frozen=True)
class ExtractedSet:
    """Images of a query set or a gallery, and their features.

    Attributes:
        entries: the N images.
        features: [N, D] their features.
    """

    entries: list[Row]
    features: Tensor


def write_features(path: str | os.PathLike[str], model: TrainedModel, sets: dict[str, ExtractedSet]) -> bool:
    """Writes features in the format that ``drsl-evaluate`` reads, whole or not at all.

    Identities are written where those of all images are known, and cameras likewise.

    Args:
        path: the .npz file.
        model: the model that they are of.
        sets: ``"query"`` and ``"gallery"``, or one of them.

    Returns:
        Whether ``drsl-evaluate`` can compute scores: there are both sets, and all identities are known.
    """
    rows = [row for extracted in sets.values() for row in extracted.entries]
    arrays: dict[str, Any] = {_FINGERPRINT: np.array(model.fingerprint)}
    for name, extracted in sets.items():
        arrays[name] = extracted.features.numpy()
        arrays[_PATHS.format(name)] = np.array([os.path.abspath(row.path) for row in extracted.entries])
        if all(row.identity for row in rows):
            arrays[f"{name}_ids"] = np.array([row.identity for row in extracted.entries])
            if all(row.camera for row in rows):
                arrays[f"{name}_cams"] = np.array([row.camera for row in extracted.entries])
    with replacing(path) as file:
        np.savez(file, **arrays)
    return {"query_ids", "gallery_ids"} <= set(arrays)


def read_gallery(path: str | os.PathLike[str], model: TrainedModel) -> ExtractedSet:
    """The gallery of a file that :func:`write_features` wrote.

    Raises:
        InputError: for a file that is damaged, of another format, without a gallery or of another model.
        OSError: for a file that cannot be opened.
    """
    arrays = load_arrays(path)
    missing = [name for name in (_FINGERPRINT, "gallery", _PATHS.format("gallery")) if name not in arrays]
    if missing:
        raise InputError(f"{os.fspath(path)!r} lacks {', '.join(missing)}: give a file of a gallery from drsl-extract")
    if str(arrays[_FINGERPRINT]) != model.fingerprint:
        raise InputError(
            f"{os.fspath(path)!r} holds features of another model than {model.path!r}, and features of two models "
            f"cannot be compared: extract them again with this checkpoint"
        )
    features, paths = arrays["gallery"], arrays[_PATHS.format("gallery")]
    columns = [paths, *(arrays.get(f"gallery_{name}", np.full(paths.shape, "")) for name in ("ids", "cams"))]
    if features.ndim != 2 or features.dtype.kind != "f" or any(part.shape != features.shape[:1] for part in columns):
        raise InputError(
            f"{os.fspath(path)!r}: gallery must hold [images, dimensions] numbers, and its paths, identities and "
            f"cameras one value for each image; extract them again"
        )
    entries = [Row(*map(str, row)) for row in zip(*columns, strict=True)]
    return ExtractedSet(entries, torch.from_numpy(features.astype(np.float32)))
