"""Images in memory with their identities, and their split into training, validation and test identities."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pml_drsl.checks import InputError

TEST = "test"
# An identity has a match in the test only if it has two images.
FEWEST_IMAGES = 2
FEWEST_IDENTITIES = 4


@dataclass(frozen=True)
class Images:
    """Images with identities.

    Attributes:
        pixels: uint8, shape (N, channels, height, width).
        labels: identity of each image, from 0 up, shape (N,).
        cameras: camera of each image, shape (N,). None for images without cameras: every image is then searched for
            in all others.
        queries: whether each image is a query, or else in the gallery; bool, shape (N,). None where every image is
            a query and in the gallery.
        groups: group of each identity (its alphabet, for a character), shape (identities,). None without groups.
        numbers: number of each identity in the whole data set, shape (identities,). None stands for 0, 1, 2 ...
    """

    pixels: Tensor
    labels: Tensor
    cameras: Tensor | None = None
    queries: Tensor | None = None
    groups: Tensor | None = None
    numbers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identities(self) -> int:
        return int(self.labels.max()) + 1

    def of(self, identities: Tensor) -> Images:
        """Images of these identities, numbered from 0 in the order of their present labels."""
        wanted = identities.sort().values
        chosen = torch.isin(self.labels, wanted)
        numbers = torch.arange(self.identities) if self.numbers is None else self.numbers
        return Images(
            self.pixels[chosen],
            torch.searchsorted(wanted, self.labels[chosen]),
            None if self.cameras is None else self.cameras[chosen],
            None if self.queries is None else self.queries[chosen],
            None if self.groups is None else self.groups[wanted],
            numbers[wanted],
        )


@dataclass(frozen=True)
class Data:
    """A data set, and its splits: no identity is trained on and tested on in one split.

    Attributes:
        train: training images; all images where the test identities are drawn at random.
        test: test images; None where they are drawn.
        drawn: how many identities each draw trains on; 0 where the test images are given.
        folds: into how many parts validation divides the training identities.
    """

    train: Images
    test: Images | None = None
    drawn: int = 0
    folds: int = 3
    _cache: dict[tuple[str, int], tuple[Images, Images]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def splits(self) -> list[str]:
        """Names of the validation splits."""
        return [f"fold {fold}" for fold in range(self.folds)]

    @property
    def has_cameras(self) -> bool:
        return (self.test or self.train).cameras is not None

    @property
    def test_identities(self) -> int:
        return self.train.identities - self.drawn if self.test is None else self.test.identities

    def split(self, name: str, seed: int = 0) -> tuple[Images, Images]:
        """Images to train on, and images to test on.

        Args:
            name: ``"test"``, or ``"fold 0"``, ``"fold 1"`` ...: validation, which knows the training identities alone.
                A fold holds out whole groups; without groups, it holds out identities drawn at random.
            seed: which draw of the test identities, where they are drawn. Validation always has draw 0.
        """
        key = name, (seed if self.drawn and name == TEST else 0)
        if key not in self._cache:
            if len(self._cache) > self.folds:
                self._cache.clear()
            self._cache[key] = self._split(*key)
        return self._cache[key]

    def _split(self, name: str, seed: int) -> tuple[Images, Images]:
        train, test = self.train, self.test
        if test is None:
            identities = list(range(train.identities))
            random.Random(seed).shuffle(identities)
            chosen, others = torch.tensor(identities[: self.drawn]), torch.tensor(identities[self.drawn :])
            train, test = train.of(chosen), train.of(others)
        if name == TEST:
            return train, test
        fold = _folds(train, self.folds)
        held_out = fold == self.splits.index(name)
        return train.of((~held_out).nonzero()[:, 0]), train.of(held_out.nonzero()[:, 0])


def _folds(train: Images, folds: int) -> Tensor:
    """Fold of each identity, shape (identities,): whole groups, in folds of about equally many identities."""
    groups = train.groups
    if groups is None or len(groups.unique()) < folds:
        groups = torch.arange(train.identities)
    names, sizes = groups.unique(return_counts=True)
    order = list(range(len(names)))
    random.Random(0).shuffle(order)
    order.sort(key=lambda number: -int(sizes[number]))
    filled = [0] * folds
    fold = torch.zeros(train.identities, dtype=torch.long)
    for number in order:
        smallest = filled.index(min(filled))
        filled[smallest] += int(sizes[number])
        fold[groups == names[number]] = smallest
    return fold


def check(name: str, data: Data) -> None:
    """Raises InputError for images that cannot be trained and tested on."""
    for part, images in zip(("training", "test"), data.split(TEST), strict=True):
        if images.identities < FEWEST_IDENTITIES:
            raise InputError(
                f"{name}: {images.identities} {part} identities are too few to rank; give {FEWEST_IDENTITIES} or more"
            )
        if int(torch.bincount(images.labels).max()) < FEWEST_IMAGES:
            raise InputError(f"{name}: no {part} identity has two images, so there is nothing to find")
    trained = data.split(TEST)[0].identities
    if trained < 2 * data.folds:
        raise InputError(f"{name}: {trained} training identities cannot be held out in {data.folds} folds")


def digest(data: Data) -> str:
    """Eight letters that tell data sets apart: a hash of all pixels and labels."""
    found = hashlib.sha256()
    for images in (data.train, data.test):
        if images is not None:
            for part in (images.pixels, images.labels, images.cameras, images.queries):
                if part is not None:
                    found.update(part.numpy().tobytes())
    return found.hexdigest()[:8]


def read_pixels(paths: Sequence[str | Path], height: int, width: int, color: bool) -> Tensor:
    """Pixels of image files, uint8, shape (N, 3 or 1, height, width). Raises InputError for one that is no image."""
    from PIL import Image, UnidentifiedImageError

    pixels = torch.empty(len(paths), 3 if color else 1, height, width, dtype=torch.uint8)
    for row, path in enumerate(tqdm(paths, "reading images", leave=False, unit="image")):
        try:
            with Image.open(path) as image:
                small = image.convert("RGB" if color else "L").resize((width, height), Image.Resampling.BOX)
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{path} is not an image that can be read ({error}); repair or remove it") from None
        pixels[row] = torch.from_numpy(np.array(small)).reshape(height, width, -1).permute(2, 0, 1)
    return pixels
