"""Training batches depend only on the state of the generators at the start of their epoch."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from toy_data import make_image_manager, make_video_manager

from torchreid_ext.data.loading import rebuilt, repeatable
from torchreid_ext.runtime.generators import restore, seed_everything, state

AUGMENTED = ["random_flip", "random_crop", "random_patch", "color_jitter", "random_erase"]


def images(loader):
    return torch.cat([batch["img"] for batch in loader])


def augmented_loader(folder, workers):
    loader = make_image_manager(folder, transforms=AUGMENTED, workers=workers).train_loader
    (patch,) = (step for step in loader.dataset.transform.transforms if hasattr(step, "patchpool"))
    # It pastes patches only after it has cut a hundred, which the toy data are too small for.
    patch.min_sample_size, patch.prob_happen = 1, 1.0
    return repeatable(loader)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_second_epoch_is_the_first_of_a_resumed_run(tmp_path, workers):
    loader = augmented_loader(tmp_path, workers)
    seed_everything(0)
    first = images(loader)
    at_second = state()
    second = images(loader)
    assert not torch.equal(first, second)
    resumed = augmented_loader(tmp_path, workers)
    restore(at_second)
    assert torch.equal(images(resumed), second)


def drawn(_image=None):
    return [torch.rand(()).item(), random.random(), np.random.rand()]


def mixed(samples):
    """What was drawn for the samples and for the batch, by torch, Python and NumPy."""
    return np.array([*(sample["img"] for sample in samples), drawn()])


@pytest.mark.parametrize("workers", [0, 1])
def test_what_joins_the_samples_of_a_batch_draws_as_the_seed_says_and_repeats(tmp_path, workers):
    def joined():
        loader = make_image_manager(tmp_path, workers=workers).train_loader
        loader.dataset.transform = drawn
        return repeatable(rebuilt(loader, loader.dataset, collate_fn=mixed))

    loader = joined()
    seed_everything(0)
    first, at_second = [*loader], state()
    second = [*loader]
    seed_everything(1)
    numbers = np.concatenate([*first, *second, *loader]).ravel()
    assert len({*numbers.tolist()}) == numbers.size
    loader = joined()
    restore(at_second)
    assert np.array_equal([*loader], second)


def test_the_number_of_workers_changes_nothing(tmp_path):
    # This is not true of random_patch, because each worker has its own pool of patches.
    augmented = [name for name in AUGMENTED if name != "random_patch"]
    epochs = []
    for workers in (0, 2):
        loader = repeatable(make_image_manager(tmp_path, transforms=augmented, workers=workers).train_loader)
        seed_everything(0)
        epochs.append((images(loader), images(loader)))
    assert torch.equal(epochs[0][0], epochs[1][0]) and torch.equal(epochs[0][1], epochs[1][1])


def test_random_frames_of_a_tracklet_repeat(tmp_path):
    loader = repeatable(make_video_manager(tmp_path, sample_method="random", seq_len=1, workers=1).train_loader)
    seed_everything(0)
    first = images(loader)
    again = repeatable(make_video_manager(tmp_path, sample_method="random", seq_len=1, workers=0).train_loader)
    seed_everything(0)
    assert torch.equal(images(again), first)


def test_reading_draws_once_an_epoch_from_the_global_generators(tmp_path):
    loader = repeatable(
        make_image_manager(tmp_path, transforms=AUGMENTED, train_sampler="SequentialSampler").train_loader
    )
    seed_everything(0)
    torch.randint(2**62, ())
    after_one_draw = torch.rand(3), random.random(), np.random.rand()
    seed_everything(0)
    images(loader)
    assert torch.equal(torch.rand(3), after_one_draw[0])
    assert (random.random(), np.random.rand()) == after_one_draw[1:]


class Numbers(Dataset):
    """A data set whose samples are whatever its transform draws."""

    def __init__(self, transform):
        self.transform = transform
        self.data = [((), 0, 0)] * 6  # without images

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.transform()


def values(loader):
    return torch.cat(list(loader)).tolist()


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(()).item()])
def test_every_image_has_random_numbers_of_its_own(draw):
    drawn = DataLoader(Numbers(draw), batch_size=2, sampler=[0, 0, 1, 1, 0, 0])
    loader = repeatable(drawn)
    assert len({*values(loader), *values(loader)}) == 12


def test_workers_stay_alive_between_epochs(tmp_path):
    given = make_image_manager(tmp_path, workers=1).train_loader
    loader = repeatable(rebuilt(given, given.dataset, persistent_workers=True))
    processes = []
    for _ in range(2):
        iterator = iter(loader)
        processes.append([worker.pid for worker in iterator._workers])
        list(iterator)
    assert processes[0] == processes[1]
    assert repeatable(loader) is loader


def test_a_loader_without_batches_is_refused(tmp_path):
    loader = make_image_manager(tmp_path).train_loader
    with pytest.raises(ValueError, match="must make batches"):
        repeatable(DataLoader(loader.dataset, batch_size=None))
