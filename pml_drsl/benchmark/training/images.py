"""Images to train and test retrieval on: small enough to be held in memory, identities of the test never trained on."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from pml_drsl.checks import InputError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
# An identity has a match in the test only if it has two images.
FEWEST_IMAGES = 2


@dataclass(frozen=True)
class Images:
    """Images with identities.

    Attributes:
        pixels: uint8, shape (N, channels, height, width).
        labels: identity of each, from 0 up, shape (N,).
        cameras: camera of each, shape (N,); None where there are none: every image is then searched for in all others.
        queries: which ones are queries, the others being the gallery, bool, shape (N,); None where all are both.
    """

    pixels: Tensor
    labels: Tensor
    cameras: Tensor | None = None
    queries: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identities(self) -> int:
        return int(self.labels.max()) + 1

    def of(self, identities: slice) -> Images:
        """Images of these identities, numbered anew."""
        wanted = torch.arange(self.identities)[identities]
        chosen = torch.isin(self.labels, wanted)
        cameras = None if self.cameras is None else self.cameras[chosen]
        return Images(self.pixels[chosen], self.labels[chosen] - int(wanted[0]), cameras)


@dataclass(frozen=True)
class Data:
    """A split of one set of images: no identity of ``test`` is in ``train``.

    Attributes:
        name: what a results file calls it: where it is from, and a digest of all pixels and labels.
    """

    name: str
    train: Images
    test: Images

    def split(self, name: str) -> tuple[Images, Images]:
        """What to train and what to test on: ``"test"``, or ``"validation"``, which knows the training set alone.

        Validation holds out the last quarter of the training identities, in order of name: names that begin alike
        (the characters of an alphabet) tend to look alike, and the test's do not begin like them.
        """
        if name == "test":
            return self.train, self.test
        kept = self.train.identities - max(2, self.train.identities // 4)
        return self.train.of(slice(0, kept)), self.train.of(slice(kept, None))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("images (scikit-learn's digits where none are given)")
    images.add_argument(
        "--train", type=Path, nargs="+", metavar="FOLDER", help="folders of training images: FOLDER/.../identity/*.png"
    )
    images.add_argument(
        "--test",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="folders of test images, of other identities (the second half of the identities of --train)",
    )
    images.add_argument("-s", "--sources", nargs="+", metavar="SET", help="torchreid data sets to train on")
    images.add_argument("-t", "--targets", metavar="SET", help="torchreid data set to test on (the first source)")
    images.add_argument("--root", default="reid-data", help="where torchreid's data sets are (%(default)s)")
    images.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=[28, 28], help="of the images (28 28)"
    )
    images.add_argument("--color", action="store_true", help="three channels; always with torchreid's data sets")


def load(args: argparse.Namespace) -> Data:
    """What the arguments ask for. Raises InputError for what cannot be had."""
    height, width = args.size
    if min(height, width) < 16:
        raise InputError(f"--size {height} {width}: the network halves images four times; give 16 or more")
    if args.sources or args.targets:
        if args.train or args.test:
            raise InputError("give folders (--train) or torchreid's data sets (-s), not both")
        name, train, test = _torchreid(args.sources or [args.targets], args.targets, args.root, height, width)
    elif args.train:
        name, train, test = _folders(args.train, args.test, height, width, args.color)
    elif args.test:
        raise InputError("--test needs --train")
    else:
        name, train, test = _digits(height, width)
    for part, images in (("training", train), ("test", test)):
        if images.identities < 4:
            raise InputError(f"{name}: {images.identities} {part} identities are too few to rank; give 4 or more")
        if int(torch.bincount(images.labels).max()) < FEWEST_IMAGES:
            raise InputError(f"{name}: no {part} identity has two images, so there is nothing to find")
    return Data(f"{name}-{_digest(train, test)}", train, test)


def _digest(*parts: Images) -> str:
    digest = hashlib.sha256()
    for images in parts:
        digest.update(images.pixels.numpy().tobytes())
        digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()[:8]


def _digits(height: int, width: int) -> tuple[str, Images, Images]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(digits.images * (255 / 16)).float()[:, None]
    pixels = F.interpolate(pixels, (height, width), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    train = labels < 6
    return f"digits-{height}x{width}", Images(pixels[train], labels[train]), Images(pixels[~train], labels[~train] - 6)


def _folders(
    train: Sequence[Path], test: Sequence[Path] | None, height: int, width: int, color: bool
) -> tuple[str, Images, Images]:
    identities = _identities(train)
    if test is None:
        half = len(identities) // 2
        identities, others = identities[:half], identities[half:]
    else:
        others = _identities(test)
        both = {folder for folder, _ in identities} & {folder for folder, _ in others}
        if both:
            raise InputError(f"{min(both)} is in --train and in --test; test on identities never trained on")
    name = f"{train[0].absolute().name}-{height}x{width}"
    return name, _read(identities, height, width, color), _read(others, height, width, color)


def _identities(folders: Sequence[Path]) -> list[tuple[Path, list[Path]]]:
    """Every folder below that holds images, and its images, both in order of name."""
    found: dict[Path, list[Path]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder")
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in ENDINGS:
                found.setdefault(path.parent, []).append(path)
    if not found:
        raise InputError(f"no images ({', '.join(sorted(ENDINGS))}) below {', '.join(map(str, folders))}")
    return list(found.items())


def _read(identities: Sequence[tuple[Path, list[Path]]], height: int, width: int, color: bool) -> Images:
    paths = [path for _, of_identity in identities for path in of_identity]
    labels = [label for label, (_, of_identity) in enumerate(identities) for _ in of_identity]
    return Images(_pixels(paths, height, width, color), torch.tensor(labels))


def _pixels(paths: Sequence[str | Path], height: int, width: int, color: bool) -> Tensor:
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


def _torchreid(
    sources: Sequence[str], target: str | None, root: str, height: int, width: int
) -> tuple[str, Images, Images]:
    import torchreid

    def samples(name: str, mode: str) -> list[tuple[str, int, int]]:
        try:
            dataset = torchreid.data.datasets.init_image_dataset(name, root=root, mode=mode)
        except (OSError, RuntimeError) as error:
            raise InputError(f"torchreid's {name} cannot be had from --root {root}: {error}") from None
        return [(sample[0], sample[1], sample[2]) for sample in getattr(dataset, mode)]

    train: list[tuple[str, int, int]] = []
    for name in sources:
        first = 1 + max((label for _, label, _ in train), default=-1)
        train += [(path, label + first, camera) for path, label, camera in samples(name, "train")]
    target = target or sources[0]
    query, gallery = samples(target, "query"), samples(target, "gallery")
    return (
        f"{'+'.join(sources)}-{target}-{height}x{width}",
        _of_samples(train, height, width),
        _of_samples(query + gallery, height, width, len(query)),
    )


def _of_samples(samples: Sequence[tuple[str, int, int]], height: int, width: int, queries: int | None = None) -> Images:
    paths, labels, cameras = zip(*samples, strict=True)
    _, numbered = torch.tensor(labels).unique(return_inverse=True)
    is_query = None if queries is None else torch.arange(len(samples)) < queries
    return Images(_pixels(paths, height, width, color=True), numbered, torch.tensor(cameras), is_query)
