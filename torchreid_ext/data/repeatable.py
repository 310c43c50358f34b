"""Deterministic loading: every sample of a training batch carries its own seed.

torchreid's augmentations draw from the global generators of the process that reads an image. With a seed for every
sample, the result does not depend on the number of workers, or on what they read before. A resumed epoch is therefore
equal to the epoch of a run that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Sampler

from pml_drsl.checks import InputError
from torchreid_ext.data.loading import WrappedDataset, rebuilt
from torchreid_ext.runtime import distributed, generators


class Draw(NamedTuple):
    """One entry of a batch: the index of a sample, the seed of the epoch, and the position in the epoch."""

    sample: int
    epoch_seed: int
    position: int


class SeededBatches(Sampler[list[Draw]]):
    """The batches of a batch sampler, with a seed for every index. Each process gets its share of every batch.

    All batches of an epoch are drawn from the global generators when the epoch begins. It therefore does not matter how
    far a loader reads ahead. The first process draws the batches for all processes, and draws the same batches in a run
    of one process. At the start of every epoch each other process seeds its generators with its own seed, so that
    dropout differs between processes.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        batches, epoch_seed = distributed.from_first(self._draw)
        if not distributed.is_first():
            generators.seed_everything(epoch_seed + distributed.rank())
        position = 0
        for batch in batches:
            yield distributed.share([Draw(sample, epoch_seed, position + i) for i, sample in enumerate(batch)])
            position += len(batch)

    def _draw(self) -> tuple[list[list[int]], int]:
        return list(self.batches), int(torch.randint(2**62, ()))


class SeededDataset(WrappedDataset):
    """Reads each sample of a data set with the seed of its ``Draw``.

    At the start of each epoch, the patches that torchreid's ``random_patch`` cut from earlier images are removed.
    """

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        self._epoch_seed: int | None = None

    def __getitem__(self, draw: Draw) -> Any:
        if draw.epoch_seed != self._epoch_seed:
            self._epoch_seed = draw.epoch_seed
            for step in getattr(getattr(self, "transform", None), "transforms", []):
                if hasattr(step, "patchpool"):
                    step.patchpool.clear()
        with generators.seeded(draw.epoch_seed + draw.position):
            return self.dataset[draw.sample]


def repeatable(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a loader like ``loader``, whose epochs depend only on the state of the global generators at their start.

    The workers of the loader stay alive from epoch to epoch.

    Raises:
        InputError: if the loader does not make batches.
    """
    if isinstance(loader.dataset, SeededDataset):
        return loader
    if loader.batch_sampler is None:
        raise InputError("the training loader must make batches: give it a batch_size or a batch_sampler")
    return rebuilt(
        loader,
        SeededDataset(loader.dataset),
        batch_sampler=SeededBatches(loader.batch_sampler),
        persistent_workers=loader.num_workers > 0,
        # A loader draws the seeds of its workers from its generator, once in their life. With the global generator, a
        # resumed run would make one more draw than a run that was not interrupted.
        generator=torch.Generator(),
    )
