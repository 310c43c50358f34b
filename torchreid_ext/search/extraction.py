"""Extracts the features of a list of images: in batches, with a progress bar, and by several processes together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.evaluation.ranking import share
from torchreid_ext.evaluation.extraction import Samples, gather_samples
from torchreid_ext.runtime import distributed
from torchreid_ext.search.model import TrainedModel
from torchreid_ext.search.preprocessing import Preprocessing


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
