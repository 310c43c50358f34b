"""Samplers of identities: whole batches, an exact length, and errors before training."""

import itertools

import numpy as np
import pytest
import torch
import torchreid
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_data import make_image_manager

from torchreid_ext import ImageDRSLEngine
from torchreid_ext.data.samplers import IdentitySampler, PerClassSampler


def batches(sampler, size):
    indices = list(sampler)
    assert len(indices) == len(sampler) and len(indices) % size == 0
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def most_batches(groups, identities):
    """The number of batches of different identities, by filling them greedily: always those with most groups left."""
    groups, number = sorted(groups), 0
    while len(groups) >= identities and groups[-identities] > 0:
        for place in range(len(groups) - identities, len(groups)):
            groups[place] -= 1
        groups.sort()
        number += 1
    return number


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 14), min_size=2, max_size=12),
    identities=st.integers(2, 5),
    num_instances=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_identity_sampler(counts, identities, num_instances, seed):
    torch.manual_seed(seed)
    # Identities with gaps between them, in no order.
    pids = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)) * 7 - 3, counts)).tolist()
    size = identities * num_instances
    if len(counts) < identities:
        with pytest.raises(
            ValueError, match=rf"cannot fill a batch.*needs {identities} identities.*have {len(counts)}"
        ):
            IdentitySampler(pids, size, num_instances)
        return
    sampler = IdentitySampler(pids, size, num_instances)
    drawn = batches(sampler, size)
    assert len(drawn) == most_batches([max(1, count // num_instances) for count in counts], identities)
    for batch in drawn:
        names, times = np.unique([pids[index] for index in batch], return_counts=True)
        assert len(names) == identities and set(times) == {num_instances}
    times = np.bincount([index for batch in drawn for index in batch], minlength=len(pids))
    for index, pid in enumerate(pids):
        if pids.count(pid) >= num_instances:
            assert times[index] <= 1


def test_a_small_identity_shows_all_its_images():
    drawn = batches(IdentitySampler([0, 0, 0, 1, 1, 1, 1], 8, 4), 8)
    assert sorted(set(drawn[0])) == list(range(7))


@pytest.mark.parametrize("kind", [IdentitySampler, PerClassSampler])
def test_epochs_differ_and_repeat_with_the_seed(kind):
    sampler = kind([0, 1, 2, 3] * 8, 8, 4)
    torch.manual_seed(5)
    np.random.seed(5)
    first, second = list(sampler), list(sampler)
    assert first != second
    # Another sampler, and one that has lived: a resumed run has the one, an uninterrupted run the other.
    for again in (kind([0, 1, 2, 3] * 8, 8, 4), sampler):
        torch.manual_seed(5)
        np.random.seed(5)
        assert list(again) == first


def test_every_identity_meets_every_other():
    torch.manual_seed(0)
    pids = np.repeat(np.arange(12), 8).tolist()
    sampler = IdentitySampler(pids, 8, 4)
    met = {frozenset(pids[index] for index in batch) for _ in range(60) for batch in batches(sampler, 8)}
    assert len(met) == 12 * 11 / 2


def test_every_image_meets_every_other_of_its_identity():
    torch.manual_seed(0)
    pids = np.repeat(np.arange(5), 6).tolist()  # An epoch leaves out two images of each identity, and one identity.
    sampler = IdentitySampler(pids, 8, 4)
    drawn = [batch for _ in range(60) for batch in batches(sampler, 8)]
    met = {pair for batch in drawn for pair in itertools.combinations(sorted(batch), 2)}
    assert len([pair for pair in met if pids[pair[0]] == pids[pair[1]]]) == 5 * 15


def test_per_class_sampler_is_pmls():
    np.random.seed(0)
    pids = [0] * 9 + [4] * 2 + [9] * 5
    for batch in batches(PerClassSampler(pids, 6, 3), 6):
        names, times = np.unique([pids[index] for index in batch], return_counts=True)
        assert len(names) == 2 and set(times) == {3}


@pytest.mark.parametrize(
    ("kind", "batch_size", "num_instances", "message"),
    [
        (IdentitySampler, 10, 4, "batch_size 10 is not a multiple of sampler.num_instances 4.*: make it 8 or 12"),
        (IdentitySampler, 4, 4, "leaves one identity in a batch"),
        (IdentitySampler, 8, 0, "num_instances takes whole numbers of 1 or more, got 0"),
        (PerClassSampler, 40, 4, "needs 10 identities, and the sources have 3"),
    ],
)
def test_what_cannot_be_filled_is_refused(kind, batch_size, num_instances, message):
    with pytest.raises(ValueError, match=message):
        kind([0, 1, 2] * 5, batch_size, num_instances)


def engine_for(manager):
    model = torchreid.models.build_model("osnet_x0_25", manager.num_train_pids, loss="triplet", pretrained=False)
    return ImageDRSLEngine(manager, model, torch.optim.SGD(model.parameters(), lr=0.01), use_gpu=False)


def test_an_engine_replaces_torchreids_own(tmp_path):
    loader = engine_for(make_image_manager(tmp_path, batch_size_train=8, num_instances=2)).train_loader
    pids = [data["pid"].tolist() for data in loader]
    assert len(pids) == len(loader)
    assert [[batch.count(pid) for pid in set(batch)] for batch in pids] == [[2] * 4] * len(pids)


class FixedOrder(torchreid.data.sampler.RandomIdentitySampler):
    def __iter__(self):
        return iter(range(16))


def test_an_engine_keeps_a_subclass_of_torchreids(tmp_path):
    items = make_image_manager(tmp_path).train_loader.dataset.train
    loader = engine_for(with_sampler(tmp_path, FixedOrder(items, 8, 4))).train_loader
    assert [int(pid) for data in loader for pid in data["pid"]] == [items[index][1] for index in range(16)]


@pytest.mark.parametrize(("size", "words"), [(10, "straddle two batches"), (4, "leaves one identity in a batch")])
def test_an_engine_refuses_batches_that_cannot_be_ranked(tmp_path, size, words):
    with pytest.raises(ValueError, match=words):
        engine_for(make_image_manager(tmp_path, batch_size_train=size, num_instances=4))


def test_one_image_of_each_identity_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="num_instances 1 draws one: set sampler.num_instances to 4"):
        engine_for(make_image_manager(tmp_path, batch_size_train=4, num_instances=1))


class OwnSampler(torch.utils.data.Sampler):
    """A user's sampler with random numbers of its own."""

    def __init__(self, number, length):
        self.generator = np.random.default_rng(0)
        self.number, self.length = number, length

    def __iter__(self):
        return iter(self.generator.permutation(self.number).tolist())

    def __len__(self):
        return self.length


class Endless(torch.utils.data.Sampler):
    def __iter__(self):
        while True:
            yield 0


def with_sampler(folder, sampler):
    manager = make_image_manager(folder)
    manager.train_loader = torch.utils.data.DataLoader(
        manager.train_loader.dataset, batch_size=8, sampler=sampler, drop_last=True
    )
    return manager


def test_making_an_engine_does_not_advance_the_samplers_own_generator(tmp_path):
    sampler = OwnSampler(24, 24)
    before = sampler.generator.bit_generator.state
    engine = engine_for(with_sampler(tmp_path, sampler))
    assert sampler.generator.bit_generator.state == before
    first = [int(pid) for data in engine.train_loader for pid in data["pid"]]
    pids = [items[1] for items in engine.train_loader.dataset.train]
    assert first == [pids[index] for index in np.random.default_rng(0).permutation(24)]


def test_a_sampler_that_fills_no_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a batch of 8 cannot be filled: OwnSampler draws 7 of the 24"):
        engine_for(with_sampler(tmp_path, OwnSampler(7, 7)))


def test_a_sampler_without_a_length_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"object of type 'Endless' has no len\(\)"):
        engine_for(with_sampler(tmp_path, Endless()))


def test_a_sampler_that_draws_less_than_it_says_stops_the_run(tmp_path):
    engine = engine_for(with_sampler(tmp_path, OwnSampler(0, 24)))
    with pytest.raises(FloatingPointError, match="epoch 1 had no batch with a finite loss, of 0 that"):
        engine.run(str(tmp_path / "log"), max_epoch=1)
