"""Where the images of a data set come from: folders, torchreid's data sets, or scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from pml_drsl.benchmark.training.folders import DEFAULT_PATTERN, ImageFile, find
from pml_drsl.benchmark.training.images import Data, Images, read_pixels
from pml_drsl.checks import InputError

PEDESTRIANS = "synthetic_pedestrians"
DIGITS = "digits"


@dataclass(frozen=True)
class Source:
    """Where the images of a data set come from.

    Attributes:
        folder: folder of the images, below ``--root``.
        pattern: regular expression for the path of an image below ``folder``, see ``folders.find``.
        train: folders of training images, below ``folder``; empty for ``folder`` itself.
        test: folders of test images. Empty: the test identities are drawn from the training images, by the seed.
        draw: how many identities a draw trains on; 0 for half of them.
        query_cameras: names of the cameras whose images are queries; all other images are then the gallery.
        torchreid: names of torchreid's data sets to train on; ``synthetic_pedestrians`` is drawn where it is missing.
        target: name of torchreid's data set to test on; empty for the first of ``torchreid``.
        size: height and width that images are scaled to.
        color: whether images have three channels; torchreid's always have.
        folds: parts of the training identities, each held out once for validation.
        seeds: runs on the test identities.
    """

    folder: str = ""
    pattern: str = DEFAULT_PATTERN
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    draw: int = 0
    query_cameras: tuple[str, ...] = ()
    torchreid: tuple[str, ...] = ()
    target: str = ""
    size: tuple[int, int] = (28, 28)
    color: bool = False
    folds: int = 2
    seeds: int = 3


def read(name: str, source: Source, root: Path) -> Data:
    """Reads the images of a set. Raises InputError for images that cannot be had."""
    if source.torchreid:
        return _torchreid(source, root)
    if name == DIGITS and source == Source(size=source.size, folds=source.folds, seeds=source.seeds):
        return _digits(source)
    folder = root / source.folder
    if source.test and not source.train:
        raise InputError(f"{name}: test needs train")
    train = find([folder / part for part in source.train or ("",)], source.pattern, folder)
    if source.test:
        test = find([folder / part for part in source.test], source.pattern, folder)
        check_apart(train, test)
        return Data(images_of(train, source), images_of(test, source), folds=source.folds)
    found = images_of(train, source)
    draw = source.draw or found.identities // 2
    if not 0 < draw < found.identities:
        raise InputError(f"{name}: draw {draw}: it has {found.identities} identities, and some must be tested on")
    return Data(found, drawn=draw, folds=source.folds)


def check_apart(train: list[ImageFile], test: list[ImageFile]) -> None:
    """Raises InputError for an identity, or a folder of one, that is trained on and tested on."""
    for names in ({file.identity for file in side} for side in (train, test)), _folders(train, test):
        both = set.intersection(*names)
        if both:
            raise InputError(f"{min(both)} is in --train and in --test; test on identities never trained on")


def _folders(*sides: list[ImageFile]) -> list[set[str]]:
    """The folders of each side's images, without links; none where one folder holds several identities."""
    found = []
    for side in sides:
        of: dict[Path, set[str]] = {}
        for file in side:
            of.setdefault(file.path.parent, set()).add(file.identity)
        found.append({str(folder.resolve()) for folder, names in of.items() if len(names) == 1})
    return found


def images_of(files: list[ImageFile], source: Source) -> Images:
    """Reads the images. Identities, groups and cameras are numbered from 0 in order of their names."""
    identities, labels = _numbered([file.identity for file in files])
    group_of = {file.identity: file.group for file in files}
    groups = _numbered([group_of[identity] for identity in identities])[1]
    cameras = (
        torch.tensor(_numbered([file.camera for file in files])[1]) if any(file.camera for file in files) else None
    )
    queries = torch.tensor([file.camera in source.query_cameras for file in files]) if source.query_cameras else None
    if queries is not None and bool(queries.all() | ~queries.any()):
        raise InputError(f"query_cameras {source.query_cameras}: they have all of the images, or none of them")
    pixels = read_pixels([file.path for file in files], *source.size, source.color)
    return Images(pixels, torch.tensor(labels), cameras, queries, torch.tensor(groups) if any(groups) else None)


def _numbered(names: list[str]) -> tuple[list[str], list[int]]:
    number = {name: index for index, name in enumerate(sorted(set(names)))}
    return list(number), [number[name] for name in names]


def _digits(source: Source) -> Data:
    """scikit-learn's handwritten digits: 0 to 5 to train on, 6 to 9 to test on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images * (255 / 16)).float()[:, None]
    pixels = F.interpolate(pixels, source.size, mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(found.target).long()
    train = labels < 6
    return Data(Images(pixels[train], labels[train]), Images(pixels[~train], labels[~train] - 6), folds=source.folds)


Sample = tuple[str, int, int]
"""Path, identity and camera of an image, as torchreid's data sets hold them."""


def _torchreid(source: Source, root: Path) -> Data:
    import torchreid

    if PEDESTRIANS in source.torchreid:
        import torchreid_ext.data.datasets  # noqa: F401  registers the set

    def samples(name: str, mode: str) -> list[Sample]:
        try:
            dataset = torchreid.data.datasets.init_image_dataset(name, root=str(root), mode=mode, verbose=False)
        except (OSError, RuntimeError) as error:
            raise InputError(f"torchreid's {name} cannot be had from --root {root}: {error}") from None
        return [(sample[0], sample[1], sample[2]) for sample in getattr(dataset, mode)]

    train: list[Sample] = []
    for name in source.torchreid:
        first = 1 + max((label for _, label, _ in train), default=-1)
        train += [(path, label + first, camera) for path, label, camera in samples(name, "train")]
    target = source.target or source.torchreid[0]
    query, gallery = samples(target, "query"), samples(target, "gallery")
    test = _of_samples(query + gallery, source.size, len(query))
    return Data(_of_samples(train, source.size), test, folds=source.folds)


def _of_samples(samples: Sequence[Sample], size: tuple[int, int], queries: int | None = None) -> Images:
    paths, labels, cameras = zip(*samples, strict=True)
    _, numbered = torch.tensor(labels).unique(return_inverse=True)
    is_query = None if queries is None else torch.arange(len(samples)) < queries
    return Images(read_pixels(paths, *size, color=True), numbered, torch.tensor(cameras), is_query)
