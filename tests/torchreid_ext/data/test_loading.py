"""An unreadable image raises an InputError that names it, with and without workers, and others are read as before."""

from __future__ import annotations

import copy
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchreid
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from torchreid_ext.data.loading import ReadableDataset, read_image, readable

pytestmark = pytest.mark.timeout(60)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy())


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
    "folder": ("jpg", lambda path: (path.unlink(), path.mkdir()), "no such file"),
}


def failure(loader: DataLoader[Any]) -> str:
    """Reads everything, which must raise a ValueError, and returns its message."""
    with pytest.raises(ValueError) as caught:
        list(loader)
    # torch makes a reference cycle of the exception and the iterator of the loader. Its collection waits five seconds
    # for each worker. Without the cycle the workers end at once.
    traceback.clear_frames(caught.value.__traceback__)
    return str(caught.value)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(tmp_path: Path, kind: str, workers: int) -> None:
    suffix, damage, words = DAMAGE[kind]
    dataset = image_set(tmp_path, suffix)
    damage(tmp_path / f"4.{suffix}")
    message = failure(readable(DataLoader(dataset, batch_size=2, num_workers=workers)))
    assert str(tmp_path / f"4.{suffix}") in message and words in message


@pytest.mark.parametrize("workers", [0, 2])
def test_any_damaged_frame_of_a_video_is_named(tmp_path: Path, workers: int) -> None:
    dataset = video_set(tmp_path)
    batches = list(readable(DataLoader(dataset, batch_size=2, num_workers=workers)))
    assert batches[0]["img"].shape == (2, 2, 32, 16, 3)
    truncate(tmp_path / "1_2.png")
    assert "1_2.png" in failure(readable(DataLoader(dataset, batch_size=2, num_workers=workers)))


@pytest.mark.parametrize("workers", [0, 2])
def test_good_images_are_equal_to_those_of_the_original_loader(tmp_path: Path, workers: int) -> None:
    dataset = image_set(tmp_path)

    def loader() -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(3)
        sampler = RandomSampler(dataset, generator=generator)
        return DataLoader(dataset, 4, sampler=sampler, num_workers=workers, drop_last=True, generator=generator)

    plain, checked = loader(), readable(loader())
    for _ in range(2):
        one, other = list(plain), list(checked)
        assert len(one) == len(other) == len(checked) == 1
        assert one[0]["impath"] == other[0]["impath"] and torch.equal(one[0]["img"], other[0]["img"])


def test_settings_are_kept(tmp_path: Path) -> None:
    dataset = image_set(tmp_path)
    given: dict[str, Any] = {
        "num_workers": 2, "collate_fn": list, "timeout": 7.0, "worker_init_fn": print, "prefetch_factor": 3,
        "persistent_workers": True, "generator": torch.Generator(), "drop_last": True, "batch_size": 5,
        "sampler": SequentialSampler(dataset), "multiprocessing_context": "fork",
    }  # fmt: skip
    before = DataLoader(dataset, **given)
    after = readable(before)
    for name in (*given, "pin_memory", "in_order"):
        assert getattr(after, name, None) == getattr(before, name, None), name
    batches = BatchSampler(SequentialSampler(dataset), 4, False)
    assert readable(DataLoader(dataset, batch_sampler=batches)).batch_sampler is batches
    single = readable(DataLoader(dataset, batch_size=None, sampler=[3, 1]))
    assert [item["pid"] for item in single] == [0, 1]
    assert readable(after) is after


def test_each_image_is_decoded_once_over_all_epochs_and_workers(tmp_path: Path) -> None:
    loader = readable(DataLoader(image_set(tmp_path), batch_size=2, num_workers=2))
    list(loader)
    assert int(loader.dataset._checked.sum()) == 6  # type: ignore[attr-defined]


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


def test_read_image_accepts_what_torchreid_reads(tmp_path: Path) -> None:
    for mode in ("RGB", "L", "RGBA", "P", "1", "I;16"):
        Image.new(mode, (4, 8)).save(tmp_path / "x.png")
        read_image(tmp_path / "x.png")
    with pytest.raises(ValueError, match="no such file"):
        read_image(tmp_path / "y.png")
