"""Holds out validation identities, draws some training identities, and refuses images in training and test."""

from __future__ import annotations

import copy
import os
import random
from typing import Any

from torch.utils.data import BatchSampler, SequentialSampler

from pml_drsl.checks import InputError
from torchreid_ext.data.loading import files_of, parts, rebuilt

NAME = "validation"  # of the target that the validation identities become

Item = tuple[str | tuple[str, ...], int, int, int]
"""A path, or those of a tracklet, and the numbers of an identity, a camera and a data set, as torchreid has them."""


def hold_out(manager: Any, identities: int, share: float, seed: int, batch_size: int) -> None:
    """Keeps some training identities of a data manager, and tests on some of them instead of the targets.

    The number ``identities`` of them is kept (0: all), the same for every seed. A ``share`` of these, in [0, 1), is
    tested on in batches of ``batch_size``: the first image (or tracklet) of each identity and camera is a query, and
    all are the gallery; 0 keeps the manager's targets. The draws depend on the images' paths and on the seed alone; a
    smaller draw is a part of a larger one. What is left for training is numbered from 0. The sampler of the training
    loader must be replaced afterwards. Raises InputError for more identities than there are, or for a share that leaves
    fewer than two identities for training or for validation, or no query with a match from another camera.
    """
    loader, dataset = manager.train_loader, manager.train_loader.dataset
    # The numbers of identities may depend on the order in which a file system lists its files; the first paths do not.
    first = {pid: path for path, pid, *_ in sorted(map(_slashed, dataset.train), reverse=True)}
    kept = sorted((path, pid) for pid, path in first.items())
    if identities > len(kept):
        raise InputError(f"data.identities {identities}: the sources have {len(kept)} training identities")
    if identities:
        kept = sorted(_drawn(kept, identities, seed=0))
    pids = [pid for _, pid in kept]
    tested: list[Item] = []
    if share:
        number = round(len(kept) * share)
        if number < 2 or len(kept) - number < 2:
            taken = f"data.validation {share} of {len(kept)} training identities is {number}"
            raise InputError(f"{taken}: training and validation need two identities or more each")
        held = {pid for _, pid in _drawn(kept, number, seed)}
        tested = sorted((item for item in dataset.train if item[1] in held), key=_slashed)
        pids = [pid for pid in pids if pid not in held]
    numbers = {pid: number for number, pid in enumerate(sorted(pids))}
    train = [(path, numbers[pid], *others) for path, pid, *others in dataset.train if pid in numbers]
    dataset.train = dataset.data = train
    dataset.num_train_pids = manager._num_train_pids = len(numbers)
    dataset.num_train_cams = manager._num_train_cams = dataset.get_num_cams(train)
    manager.train_loader = rebuilt(loader, dataset, sampler=SequentialSampler(dataset))
    if share:
        _test_on(manager, dataset, tested, batch_size)
    kind = "tracklets" if manager.data_type == "video" else "images"
    print(f"=> {len(numbers)} identities with {len(train)} {kind} are trained on, {len(tested)} {kind} are held out")


def _slashed(item: Item) -> Item:
    """An item that has the same place in a sorted list on all systems: the separators of Windows follow letters."""
    return tuple(str(path).replace(os.sep, "/") for path in parts(item[0])), *item[1:]


def _drawn(items: list[Any], number: int, seed: int) -> list[Any]:
    order = list(items)
    random.Random(seed).shuffle(order)
    return order[:number]


def _test_on(manager: Any, dataset: Any, gallery: list[Item], batch_size: int) -> None:
    first: dict[tuple[int, int, int], Item] = {}
    for item in gallery:
        first.setdefault(item[1:], item)
    query = list(first.values())
    if len({item[1] for item in query}) == len(query):
        few, cure = "is seen by a single camera", "of your own data, set datasets.NAME.cameras: none"
        if len(gallery) == len(query):
            few, cure = "has a single image", "add images, or leave such people out (datasets.NAME.min_images: 2)"
        alone = f"data.validation: each of the {len(query)} validation identities {few}, so no query has a match"
        raise InputError(f"{alone}, for example {parts(query[0][0])[0]}: {cure}")
    loaders = {}
    for split, items in (("query", query), ("gallery", gallery)):
        of_split = copy.copy(dataset)
        of_split.train, of_split.query, of_split.gallery, of_split.data = [], query, gallery, items
        of_split.mode, of_split.transform, of_split.k_tfm = split, manager.transform_te, 1
        batches = BatchSampler(SequentialSampler(of_split), batch_size, drop_last=False)
        loaders[split] = rebuilt(manager.train_loader, of_split, batch_sampler=batches)
    manager.targets, manager.test_loader = [NAME], {NAME: loaders}
    manager.test_dataset = {NAME: {"query": query, "gallery": gallery}}


def check_overlap(manager: Any, tested: bool = True) -> None:
    """Refuses a data manager with an image in two sources, or (if ``tested``) in training and in the test. Files are
    compared: a link and its target are one image."""
    trained: dict[tuple[int, int], tuple[str, int]] = {}
    for item in manager.train_loader.dataset.train:
        for path in files_of(item[0]):
            other, number = trained.setdefault(_place(path), (path, item[3]))
            if number != item[3]:
                twice = f"{other} and {path} are one image in two sources, so one person would be trained on as two"
                cure = "remove one of the sources, or set data.allow_overlap True"
                raise InputError(f"data.sources {manager.sources}: {twice}: {cure}")
    for target, splits in manager.test_dataset.items() if tested else ():
        paths = {_place(path): path for items in splits.values() for item in items for path in files_of(item[0])}
        both = [path for file, path in paths.items() if file in trained]
        if both:
            share = f"{len(both)} of the {len(paths)} test images of {target!r} are training images of"
            what = f"for example {both[0]}: a test on them says nothing about new people"
            cure = "Take them out of one of the data sets, or set data.allow_overlap True"
            raise InputError(f"{share} {manager.sources} too, {what}. {cure}")


def _place(path: str) -> tuple[int, int]:
    """What tells a file from all others, whatever its paths are."""
    about = os.stat(path)
    return about.st_dev, about.st_ino
