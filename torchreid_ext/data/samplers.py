"""Samplers of batches with several images of each identity."""

from __future__ import annotations

import copy
import warnings
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torchreid
from pytorch_metric_learning.samplers import MPerClassSampler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from pml_drsl.checks import InputError
from torchreid_ext.data.loading import check_kind, rebuilt
from torchreid_ext.runtime import distributed


class IdentitySampler(Sampler[int]):
    """Batches of ``batch_size / num_instances`` identities with ``num_instances`` images each.

    An epoch shows every image at most once, unless its identity has fewer than ``num_instances`` images. It has as many
    batches as this allows: with ``g_i`` groups of ``num_instances`` images of identity i and P identities in a batch,
    the largest B with ``sum over i of min(g_i, B) >= P * B``. Raises InputError as ``check_batch``.
    """

    def __init__(self, pids: Sequence[int], batch_size: int, num_instances: int) -> None:
        self.identities = check_batch(pids, batch_size, num_instances)
        self.num_instances = num_instances
        members = defaultdict(list)
        for index, pid in enumerate(pids):
            members[pid].append(index)
        self._members = [np.array(indices) for indices in members.values()]
        groups = np.array([max(1, len(indices) // num_instances) for indices in self._members])
        # sum(min(g, B)) - P * B is concave in B and 0 at B = 0, so that every B up to the largest is allowed.
        numbers = range(1, int(groups.sum()) // self.identities + 1)
        self.num_batches = bisect_left(numbers, 1, key=lambda b: np.minimum(groups, b).sum() < self.identities * b)
        self._groups = np.minimum(groups, self.num_batches)

    def __len__(self) -> int:
        return self.num_batches * self.identities * self.num_instances

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        groups = [self._grouped(indices, rng) for indices in self._members]
        left = self._groups.copy()
        surplus = int(left.sum()) - self.num_batches * self.identities
        np.subtract.at(left, rng.choice(np.repeat(np.arange(len(left)), left), surplus, replace=False), 1)
        for batches_left in range(self.num_batches, 0, -1):
            # An identity with as many groups left as there are batches left must be in each of them. Others are drawn
            # in proportion to their groups left, so that many identities are left at the end.
            chosen = np.flatnonzero(left == batches_left)
            weights = np.where(left < batches_left, left, 0)
            if missing := self.identities - len(chosen):
                drawn = rng.choice(len(left), missing, replace=False, p=weights / weights.sum())
                chosen = np.concatenate([chosen, drawn])
            left[chosen] -= 1
            for identity in rng.permutation(chosen):
                yield from groups[identity].pop()

    def _grouped(self, indices: Any, rng: np.random.Generator) -> list[list[int]]:
        """The indices in random groups of ``num_instances``; an incomplete group is left out."""
        size = self.num_instances
        if len(indices) < size:
            indices = np.concatenate([indices, rng.choice(indices, size - len(indices))])
        shuffled = rng.permutation(indices)
        return [group.tolist() for group in shuffled[: len(shuffled) // size * size].reshape(-1, size)]


class PerClassSampler(MPerClassSampler):
    """As ``IdentitySampler``, by pytorch-metric-learning's sampler, whose order depends on no earlier epoch here."""

    def __init__(self, pids: Sequence[int], batch_size: int, num_instances: int) -> None:
        check_batch(pids, batch_size, num_instances)
        super().__init__(pids, num_instances, batch_size, max(batch_size, len(pids)))

    def __iter__(self) -> Iterator[int]:
        # MPerClassSampler shuffles its labels in place. A resumed run would otherwise shuffle another order.
        self.labels: list[int] = sorted(self.labels)
        return map(int, super().__iter__())


SAMPLERS = {"RandomIdentitySampler": IdentitySampler, "MPerClassSampler": PerClassSampler}


def whole_batches(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader like ``loader``, with ``IdentitySampler`` in the place of torchreid's ``RandomIdentitySampler``, which
    draws fewer images than its length says, splits an identity between batches, and fills a batch with one; and with
    ``PerClassSampler`` in the place of pytorch-metric-learning's ``MPerClassSampler``. Raises InputError as
    ``check_kind``."""
    check_kind(loader)
    host: Any = loader.sampler
    if type(host) is MPerClassSampler:
        sampler = copy.copy(host)
        sampler.__class__ = PerClassSampler
        return rebuilt(loader, loader.dataset, sampler=sampler)
    # A subclass draws in a way of the user's own.
    if type(host) is not torchreid.data.sampler.RandomIdentitySampler:
        return loader
    pids = [items[1] for items in host.data_source]
    return rebuilt(loader, loader.dataset, sampler=IdentitySampler(pids, loader.batch_size or 1, host.num_instances))


def steps_per_epoch(datamanager: Any) -> int:
    """The number of training steps that an engine takes in an epoch; each process of a run takes the same steps."""
    return len(whole_batches(datamanager.train_loader))


def check_trains(datamanager: Any) -> None:
    """Refuses training data that would train nothing, where torchreid says nothing; draws nothing from the sampler.
    Raises InputError for fewer samples in an epoch than in a batch, or a single identity, and as ``check_batch``."""
    loader: Any = whole_batches(datamanager.train_loader)
    name = type(loader.sampler).__name__
    drawn = len(loader.sampler)
    if drawn < (loader.batch_size or 1) or len(loader) == 0:
        few = f"{name} draws {drawn} of the {len(loader.dataset)} training samples an epoch"
        raise InputError(f"a batch of {loader.batch_size} cannot be filled: {few}; make train.batch_size smaller")
    if datamanager.num_train_pids < 2:
        raise InputError("the training data have a single identity, and a loss needs two: add images of others")


def warn_if_positives_are_rare(loader: DataLoader[Any], loss: str) -> None:
    """Warns if a loss needs several images of an identity in a batch and the sampler does not provide them."""
    host, sampler = torchreid.data.sampler, loader.sampler
    by_chance = (RandomSampler, SequentialSampler, host.RandomDomainSampler, host.RandomDatasetSampler)
    # Several augmented views of an image, or frames of a tracklet, are positives of each other.
    views = max(getattr(loader.dataset, "k_tfm", 1), getattr(loader.dataset, "seq_len", 1))
    if views > 1 or getattr(loader.dataset, "sample_method", "") == "all" or not distributed.is_first():
        return
    needs = f"{loss} needs several images of an identity in a batch"
    # A loader with a batch sampler of the user's own has a default sampler too, but does not use it.
    if type(loader.batch_sampler) is BatchSampler and isinstance(sampler, by_chance):
        cure = "set train_sampler='RandomIdentitySampler' (in a config, sampler.train_sampler)"
        warnings.warn(f"{needs}, which {type(sampler).__name__} draws by chance alone: {cure}", stacklevel=3)
    elif getattr(sampler, "num_instances", getattr(sampler, "m_per_class", 0)) == 1:
        warnings.warn(f"{needs}, and num_instances 1 draws one: set sampler.num_instances to 4, say", stacklevel=3)


def check_batch(pids: Sequence[int], batch_size: int, num_instances: int) -> int:
    """The number of identities in a batch of samples with the identities ``pids``: whole groups of ``num_instances``.
    Raises InputError for a batch of a part of a group or of a single group, or for too few identities to fill it."""
    wanted, there = check_groups(batch_size, num_instances), len(set(pids))
    if there < wanted:
        sizes = f"train.batch_size {batch_size} with sampler.num_instances {num_instances}"
        needed = f"needs {wanted} identities, and the sources have {there}"
        raise InputError(f"the sampler cannot fill a batch: {sizes} {needed}; make the batch smaller")
    return wanted


def check_groups(batch_size: int, num_instances: int) -> int:
    """The number of groups of ``num_instances`` images in a batch. Raises InputError for a batch of a part of a group
    or of a single group."""
    if num_instances < 1:
        raise InputError(f"sampler.num_instances takes whole numbers of 1 or more, got {num_instances}")
    groups = batch_size // num_instances
    if batch_size % num_instances:
        uneven = f"train.batch_size {batch_size} is not a multiple of sampler.num_instances {num_instances}"
        fitting = max(2, groups) * num_instances
        cure = f"make it {fitting} or {fitting + num_instances}"
        raise InputError(f"{uneven}, so that an identity would straddle two batches: {cure}")
    if groups < 2:
        sizes = f"train.batch_size {batch_size} with sampler.num_instances {num_instances}"
        raise InputError(f"{sizes} leaves one identity in a batch, and nothing to tell it from: make the batch larger")
    return groups
