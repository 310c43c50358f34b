"""An unreadable image raises an InputError that names it, with and without workers, and others are read as before."""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchreid
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from toy_data import make_image_manager

from pml_drsl.checks import InputError
from torchreid_ext.data import loading
from torchreid_ext.data.loading import ReadableDataset, readable, repeatable
from torchreid_ext.pixels import read_image

pytestmark = pytest.mark.timeout(60)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy())


def darkened(image: Image.Image) -> torch.Tensor:
    return torch.zeros(1)


def picture(path: Path, seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def image_set(folder: Path, suffix: str = "jpg", count: int = 6) -> Any:
    rows = [(picture(folder / f"{n}.{suffix}", n), n % 3, n % 2) for n in range(count)]
    return torchreid.data.ImageDataset(rows, rows[:1], rows[:1], transform=to_tensor, verbose=False)


def video_set(folder: Path) -> Any:
    rows = [(tuple(picture(folder / f"{n}_{f}.png", 9 * n + f) for f in range(3)), n, 0) for n in range(2)]
    return torchreid.data.VideoDataset(rows, rows, rows, transform=to_tensor, seq_len=2, verbose=False)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scribble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[60:120] = bytes(60)
    path.write_bytes(bytes(data))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated jpeg": ("jpg", truncate, "damaged"),
    "truncated png": ("png", truncate, "damaged"),
    "overwritten png": ("png", scribble, "damaged"),
    "zero bytes": ("jpg", lambda path: path.write_bytes(b""), "empty"),
    "no image": ("jpg", lambda path: path.write_text("not an image"), "not an image"),
    "missing": ("jpg", Path.unlink, "no such file"),
    "folder": ("jpg", lambda path: (path.unlink(), path.mkdir()), "it is a folder"),
}


def failure(loader: DataLoader[Any]) -> str:
    """Reads everything, which must raise a ValueError, and returns its message."""
    with pytest.raises(ValueError) as caught:
        list(loader)
    # torch makes a reference cycle of the exception and the iterator of the loader. Its collection waits five seconds
    # for each worker. Without the cycle the workers end at once.
    traceback.clear_frames(caught.value.__traceback__)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in DAMAGE), ("truncated jpeg", 2)])
def test_a_damaged_image_is_named(tmp_path: Path, kind: str, workers: int) -> None:
    suffix, damage, words = DAMAGE[kind]
    dataset = image_set(tmp_path, suffix)
    damage(tmp_path / f"4.{suffix}")
    message = failure(readable(DataLoader(dataset, batch_size=2, num_workers=workers)))
    assert str(tmp_path / f"4.{suffix}") in message and words in message and "model.resume" not in message
    training = failure(repeatable(DataLoader(dataset, batch_size=2, num_workers=workers))).splitlines()[-1]
    # Without this image, the run could not be resumed.
    cure = "restore it to go on with model.resume auto, or remove it and start a new run; drsl-train --dry-run names"
    assert cure in training and training.count("restore it") == 1


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="a new process knows no patch of this one")
def test_a_worker_without_shared_memory_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = readable(DataLoader(image_set(tmp_path, "png"), batch_size=2, num_workers=1))
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", mock.Mock(side_effect=RuntimeError("/dev/shm is full")))
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.* exited unexpectedly"):
        list(loader)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="a new process knows no patch of this one")
def test_a_worker_whose_run_is_dead_when_it_starts_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    loader = readable(DataLoader(image_set(tmp_path, "png"), batch_size=2, num_workers=1))
    assert len(list(loader)) > 0  # The run is alive.
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: dead)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.* exited unexpectedly"):
        list(loader)


def _killed(loader: DataLoader[Any], pids: Any) -> None:
    batches: Any = iter(loader)
    next(batches)
    pids.send(batches._workers[0].pid)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name != "posix", reason="there is no fork server")
def test_a_worker_of_a_fork_server_ends_with_its_run(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    loader = readable(DataLoader(image_set(tmp_path), num_workers=1, multiprocessing_context=context))
    ours, pids = context.Pipe()
    context.Process(target=_killed, args=[loader, pids]).start()
    worker = ours.recv()
    with pytest.raises(ProcessLookupError):
        while True:
            os.kill(worker, 0)
            time.sleep(0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_frame_of_a_video_is_named(tmp_path: Path, workers: int) -> None:
    dataset = video_set(tmp_path)
    batches = list(readable(DataLoader(dataset, batch_size=2, num_workers=workers)))
    assert batches[0]["img"].shape == (2, 2, 32, 16, 3)
    truncate(tmp_path / "1_1.png")
    assert "1_1.png" in failure(readable(DataLoader(dataset, batch_size=2, num_workers=workers)))


def augmented(folder: Path) -> Iterator[Any]:
    """Image and video data sets whose augmentation draws random numbers from three generators."""

    def transform(image: Image.Image) -> torch.Tensor:
        return to_tensor(image) * random.random() + float(np.random.rand()) * torch.rand(1)

    images, video = image_set(folder), video_set(folder)
    images.transform = video.transform = transform
    yield images
    for images.k_tfm in (1, 2):
        yield images
    for video.sample_method, video.seq_len in (("evenly", 2), ("evenly", 5), ("all", 1)):
        yield video


def test_good_images_are_bit_equal_to_torchreids_own_items(tmp_path: Path) -> None:
    for dataset in augmented(tmp_path):
        items = []
        for read in (dataset, ReadableDataset(dataset)):
            torchreid.utils.set_random_seed(5)
            items.append([read[index] for index in range(len(read))])
            items[-1].append({"draws": (random.random(), np.random.rand(), torch.rand(1))})
        for one, other in zip(*items, strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                views = (value, other[key]) if key == "img" and isinstance(value, list) else ([value], [other[key]])
                assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(*views, strict=True))


@pytest.mark.parametrize(("workers", "batch_size", "frames"), [(0, 1, 5), (0, 2, 2), (1, 2, 5)])
def test_every_test_draws_the_same_frames_of_tracklets(
    tmp_path: Path, workers: int, batch_size: int, frames: int
) -> None:
    """Those of three that torchreid draws if the number of the tracklet is the seed."""
    dataset, drawn = video_set(tmp_path), []
    dataset.sample_method, dataset.seq_len = "random", frames
    for index in range(2):
        torchreid.utils.set_random_seed(index)
        drawn.append(dataset[index]["img"])
    wanted = torch.stack(drawn)
    loader = readable(DataLoader(dataset, batch_size=batch_size, num_workers=workers))
    for seed in (1, 2):
        torchreid.utils.set_random_seed(seed)
        before = np.random.get_state()[1]
        assert torch.equal(torch.cat([batch["img"] for batch in loader]), wanted)
        assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("workers", [0, 2])
def test_photos_are_read_as_everywhere(tmp_path: Path, workers: int) -> None:
    dataset = image_set(tmp_path, "png", 2)
    exif = Image.Exif()
    exif[274] = 6
    Image.open(tmp_path / "0.png").save(tmp_path / "0.png", exif=exif)
    (batch, other) = readable(DataLoader(dataset, batch_size=1, num_workers=workers))
    assert batch["img"].shape == (1, 16, 32, 3) and other["img"].shape == (1, 32, 16, 3)
    assert torch.equal(batch["img"][0], to_tensor(read_image(tmp_path / "0.png")))


class Own(torchreid.data.ImageDataset):
    """A data set of the user's own that reads images in its own way."""

    def __getitem__(self, index: int) -> Any:
        return {**super().__getitem__(index), "mine": index}


def test_a_data_set_that_reads_in_its_own_way_is_checked_once_over_all_workers(tmp_path: Path) -> None:
    dataset = image_set(tmp_path)
    dataset.__class__ = Own
    loader = readable(DataLoader(dataset, batch_size=2, num_workers=2))
    assert [int(number) for batch in loader for number in batch["mine"]] == list(range(6))
    assert int(loader.dataset._checked.sum()) == 6  # type: ignore[attr-defined]
    truncate(tmp_path / "4.jpg")
    assert "4.jpg" in failure(readable(DataLoader(dataset, batch_size=2)))


class Keyed(torchreid.data.ImageDataset):
    """A data set that reads no image files."""

    def __getitem__(self, index: int) -> Any:
        return {"key": str(self.data[index][0])}


def test_a_data_set_that_reads_in_its_own_way_need_not_have_image_files(tmp_path: Path) -> None:
    dataset = image_set(tmp_path)
    truncate(tmp_path / "0.jpg")
    np.save(tmp_path / "1.npy", np.zeros(3))
    keys = [str(tmp_path / "1.npy"), 7, b"key", "0001_c1.jpg", ("a.npy", 3)]
    dataset.__class__, dataset.data = Keyed, [(key, *dataset.data[0][1:]) for key in keys]
    (batch,) = readable(DataLoader(dataset, batch_size=5))
    assert batch["key"] == [*map(str, keys)]
    dataset.data[4] = (["a.npy", str(tmp_path / "0.jpg")], *dataset.data[4][1:])
    assert "0.jpg" in failure(readable(DataLoader(dataset, batch_size=5)))


def test_a_reader_of_the_users_own_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Black(torchreid.data.ImageDataset):
        def __getitem__(self, index: int) -> Any:
            return {"img": self.transform(read_image(self.data[index][0]))}

    monkeypatch.setitem(globals(), "read_image", lambda path: Image.new("RGB", (16, 32)))
    dataset = image_set(tmp_path)
    dataset.__class__ = Black
    assert all(not batch["img"].any() for batch in readable(DataLoader(dataset, batch_size=2)))


def test_a_function_that_a_reader_calls_may_be_defined_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cell(torchreid.data.ImageDataset):
        def __getitem__(self, index: int) -> Any:
            return {"img": to_tensor(read_image(self.data[index][0]))}

    monkeypatch.setitem(globals(), "read_image", torchreid.utils.read_image)
    dataset = image_set(tmp_path)
    dataset.__class__ = Cell
    loader = readable(DataLoader(dataset, batch_size=2))
    assert all(batch["img"].any() for batch in loader)
    monkeypatch.setitem(globals(), "to_tensor", darkened)
    assert all(not batch["img"].any() for batch in loader)


def test_a_script_may_change_the_data_set_between_epochs(tmp_path: Path) -> None:
    loader: Any = repeatable(DataLoader(image_set(tmp_path), batch_size=2, num_workers=1))
    assert all(batch["img"].any() for batch in loader)
    loader.dataset.transform = darkened
    assert all(not batch["img"].any() for batch in loader)
    dataset = image_set(tmp_path)
    dataset.__class__ = Own
    longer: Any = readable(DataLoader(dataset, batch_size=2))
    dataset.data = 2 * dataset.data
    assert len(list(longer)) == 6


def test_settings_are_kept(tmp_path: Path) -> None:
    dataset = image_set(tmp_path)
    given: dict[str, Any] = {
        "num_workers": 2, "collate_fn": list, "timeout": 7.0, "worker_init_fn": print, "prefetch_factor": 3,
        "persistent_workers": True, "generator": torch.Generator(), "drop_last": True, "batch_size": 5,
        "sampler": SequentialSampler(dataset), "multiprocessing_context": "fork",
    }  # fmt: skip
    before = DataLoader(dataset, **given)
    after = readable(before)
    for name in (given.keys() - {"worker_init_fn"}) | {"pin_memory", "in_order"}:
        assert getattr(after, name, None) == getattr(before, name, None), name
    batches = BatchSampler(SequentialSampler(dataset), 4, False)
    assert readable(DataLoader(dataset, batch_sampler=batches)).batch_sampler is batches
    single = readable(DataLoader(dataset, batch_size=None, sampler=[3, 1]))
    assert [item["pid"] for item in single] == [0, 1]
    assert readable(after) is after


class Placed(torchreid.data.ImageDataset):
    """Tells which process reads, and its process group."""

    def __getitem__(self, index: int) -> Any:
        return {"process": os.getpid(), "group": os.getpgrp()}


def test_a_worker_gets_no_signal_to_the_process_group_of_the_run(tmp_path: Path) -> None:
    dataset = image_set(tmp_path)
    dataset.__class__ = Placed
    begun = functools.partial(np.save, tmp_path / "begun.npy")
    loader = repeatable(DataLoader(dataset, batch_size=6, num_workers=1, worker_init_fn=begun))
    # The workers of a server are sent this.
    loader.worker_init_fn = pickle.loads(pickle.dumps(loader.worker_init_fn))
    (batch,) = loader
    worker = int(batch["process"][0])
    assert set(batch["group"].tolist()) == {worker} and worker not in (os.getpid(), os.getpgrp())
    assert np.load(tmp_path / "begun.npy") == 0


def test_attributes_of_the_wrapped_data_set_can_be_read(tmp_path: Path) -> None:
    dataset = image_set(tmp_path)
    wrapped = ReadableDataset(dataset)
    assert len(wrapped) == 6 and wrapped.num_train_pids == 3 and wrapped.train is dataset.train
    for twin in (copy.copy(wrapped), copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert twin.train == dataset.train and twin[1]["pid"] == 1
    with pytest.raises(AttributeError, match="absent"):
        _ = wrapped.absent


def test_other_data_sets_are_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    with pytest.raises(ValueError, match="Stream is not a torchreid data set"):
        readable(DataLoader(Stream()))
    with pytest.raises(ValueError, match="list is not a torchreid data set"):
        readable(DataLoader([1, 2, 3]))  # type: ignore[arg-type]


def test_another_machine_whose_files_have_another_order_lists_them_as_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchreid lists files in the order of the file system."""
    sent: list[Any] = []
    monkeypatch.setattr(loading.distributed, "size", lambda: 2)
    monkeypatch.setattr(loading.distributed, "gathered", lambda value: [None, value])
    listed = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        manager = make_image_manager(tmp_path / place)
        lists = [manager.train_loader.dataset.train, *manager.test_dataset["toy"].values()]
        if place == "two":
            for items in lists:
                items[:] = [(path, 5 - pid % 6, *rest) for path, pid, *rest in items[::-1]]
            monkeypatch.setattr(loading.distributed, "from_first", lambda _: sent.pop(0))
        else:
            monkeypatch.setattr(loading.distributed, "from_first", lambda f: sent.append(f()) or f())
        loading.list_as_first(manager)
        listed.append([[(Path(item[0]).name, *item[1:]) for item in items] for items in lists])
        assert all(Path(item[0]).is_relative_to(tmp_path / place) for items in lists for item in items)
    assert listed[0] == listed[1]
    monkeypatch.setattr(loading.distributed, "from_first", lambda f: f()[1:])
    with pytest.raises(InputError, match=r"has other images than the first, for example .*png: give every machine"):
        loading.list_as_first(manager)
