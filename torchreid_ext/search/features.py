"""The features of images: extracted by one process or several, and kept in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.console import replacing, say
from pml_drsl.evaluation.arrays import load_arrays
from pml_drsl.evaluation.ranking import share
from torchreid_ext.evaluation.extraction import Samples, gather_samples
from torchreid_ext.evaluation.page import Box
from torchreid_ext.images import Row, Table, composed
from torchreid_ext.pixels import Array, NoAccess
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime.files import remove_unfinished
from torchreid_ext.search.model import Preprocessing, TrainedModel

_FINGERPRINT = "model_fingerprint"  # beside the arrays of drsl-evaluate, which ignores it


@dataclass(frozen=True)
class ExtractedSet:
    """N images, and their features on the CPU."""

    entries: list[Row]
    features: Tensor  # [N, D]


def _read(
    preprocessing: Preprocessing, crop: Box | None, batch: Sequence[tuple[int, str]]
) -> tuple[list[int], Array | None, list[InputError]]:
    """The indices and images of the files that can be read, and what is wrong with the others. The images are an array:
    a tensor that a loading process sends needs open files and shared memory, of which Docker gives little."""
    images, errors = dict[int, Tensor](), list[InputError]()
    for index, path in batch:
        try:
            images[index] = preprocessing(path, crop)
        except InputError as error:
            errors.append(error if repr(path) in str(error) else InputError(f"{path!r}: {error}"))
    return [*images], torch.stack([*images.values()]).numpy() if images else None, errors


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
        skip_damaged: leave out an image that cannot be read, and say so on stderr, instead of raising an InputError.
            A file that cannot be opened is an error in any case: its disk may be gone, and many others with it.
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
    files: Any = [(index, entry.path) for index, entry in enumerate(entries)]
    workers = min(workers, len(batches)) if len(batches) > 1 else 0
    read = partial(_read, Preprocessing(model.config), crop)
    loader = DataLoader(files, batch_sampler=batches, num_workers=workers, collate_fn=read)
    damaged: list[str] = []

    def extract() -> Samples | None:
        """The features with the positions of their images in place of identities and cameras."""
        parts, kept = list[Tensor](), list[int]()
        for indices, images, errors in tqdm(loader, desc=description, leave=False, disable=None):
            for error in errors:
                if isinstance(error, NoAccess):
                    raise error
                if not skip_damaged:
                    raise InputError(f"{error}; --skip-damaged leaves such images out")
                damaged.append(str(error))
            if images is not None:
                parts.append(model.features(torch.from_numpy(images)))
                kept += indices
        return Samples(torch.cat(parts), np.array(kept), np.array(kept)) if parts else None

    found = extract() if group is None else gather_samples(extract, model.device, group)
    damaged = [reason for reasons in distributed.gathered(damaged) for reason in reasons]
    if found is None and not may_be_empty:
        raise InputError(f"none of the {len(entries)} images can be read, for example: {damaged[0]}")
    for reason in damaged if distributed.is_first() else ():
        say(f"left out: {reason}", sys.stderr)
    if found is None:
        return ExtractedSet([], torch.empty(0, 0))
    return ExtractedSet([entries[index] for index in found.pids], found.features)


def extract_sets(model: TrainedModel, table: Table, **options: Any) -> dict[str, ExtractedSet]:
    """The features of the ``"query"`` and the ``"gallery"`` of a table, those that it has. An image that is in both is
    read once. The ``options`` and the errors are those of :func:`extract_files`; an InputError also refuses queries of
    which none can be read."""
    held = {row.path for row in table.gallery}
    apart = [row for row in table.query if row.path not in held]
    read = dict[str, Tensor]()
    for name, rows in (("query", apart), ("gallery", table.gallery)):
        if rows:
            others = rows is apart and len(apart) < len(table.query)
            found = extract_files(model, rows, description=name, may_be_empty=others, **options)
            read |= zip((row.path for row in found.entries), found.features, strict=True)
    sets = dict[str, ExtractedSet]()
    for name, wanted in (("query", table.query), ("gallery", table.gallery)):
        if kept := [row for row in wanted if row.path in read]:
            sets[name] = ExtractedSet(kept, torch.stack([read[row.path] for row in kept]))
        elif wanted:
            raise InputError(f"none of the {len(wanted)} {name} images can be read")
    return sets


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
    remove_unfinished(Path(os.path.realpath(path)).parent)
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
