"""Training batches whose randomness travels with them, so that a resumed epoch is the epoch it would have been.

torchreid's augmentations draw from the global generators of whichever process reads an image. Here every draw of an
image carries a seed of its own: what becomes of it does not depend on the number of workers, on how long they have
lived, or on what they read before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pml_drsl.checks import InputError
from torchreid_ext.data.loading import rebuilt
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime import random as generators


class Draw(NamedTuple):
    """One entry of a batch: a sample's index, the seed of its epoch, and its position in the epoch."""

    sample: int
    epoch_seed: int
    position: int


class SeededBatches(Sampler[list[Draw]]):
    """The batches of a batch sampler, each index with its seed; of several processes, each has its share of every one.

    An epoch draws from the global generators when its first batch is asked for, and then no more: how far a loader
    reads ahead changes nothing. The first process draws for all, the batches that it would draw alone. The other ones'
    generators start every epoch from a seed of their own, so that two processes do not drop out the same features.
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


class SeededDataset(Dataset[Any]):
    """Reads a ``Draw`` of a data set under its seed.

    The patches that torchreid's ``random_patch`` cut from earlier images are forgotten at the start of each epoch.
    Every attribute of the wrapped data set can be read here too.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._epoch_seed: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        if draw.epoch_seed != self._epoch_seed:
            self._epoch_seed = draw.epoch_seed
            for step in getattr(getattr(self, "transform", None), "transforms", []):
                if hasattr(step, "patchpool"):
                    step.patchpool.clear()
        with generators.seeded(draw.epoch_seed + draw.position):
            return self.dataset[draw.sample]

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask for attributes before there is a data set to ask.
        if name.startswith("_") or "dataset" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)


def repeatable(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader like ``loader`` whose epochs depend on the state of the global generators at their start, and on
    nothing else; its workers live on from epoch to epoch.

    Raises:
        InputError: for a loader without batches.
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
        # From its generator a loader seeds its workers, once in their life. Were it the global one, a resumed run
        # would draw from that where an uninterrupted one does not.
        generator=torch.Generator(),
    )
