"""Training on the frames of tracklets, and retrieval with their pooled features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from pml_drsl.checks import InputError
from torchreid_ext.runtime import distributed

POOLING: dict[str, Callable[[Tensor], Tensor]] = {"avg": lambda frames: frames.mean(0), "max": lambda f: f.amax(0)}


def collate_tracklets(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of tracklets, shape (N, longest, C, H, W); their lengths may differ (``video.sample_method: all``).

    Shorter tracklets are filled up with frames of NaN.
    """
    longest = max(len(item["img"]) for item in items)
    return default_collate([{**item, "img": _padded(item["img"], longest)} for item in items])


def _padded(images: Tensor, length: int) -> Tensor:
    return torch.cat([images, images.new_full((length - len(images), *images.shape[1:]), torch.nan)])


def _frames(images: Tensor) -> tuple[Tensor, Tensor]:
    """The frames of all tracklets without the filling, shape (M, C, H, W), and the length of each, shape (N,)."""
    filled = ~images[:, :, 0, 0, 0].isnan()
    return images[filled], filled.sum(1)


class Tracklets:
    """Mixed into an engine: trains on the frames of tracklets and tests on their pooled features.

    torchreid's video engines do the same, but take no tracklets of different lengths in a batch.

    Args:
        pooling_method: how the features of the frames become one feature, ``"avg"`` or ``"max"``.

    Raises:
        InputError: for another ``pooling_method``.
    """

    model: Any
    train_loader: Any
    test_loader: Any

    def __init__(self, *args: Any, pooling_method: str = "avg", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if pooling_method not in POOLING:
            raise InputError(f"pooling_method must be 'avg' or 'max', got {pooling_method!r}")
        self.pooling_method = pooling_method
        loaders = [loader for splits in self.test_loader.values() for loader in splits.values()]
        for loader in [self.train_loader, *loaders]:
            loader.collate_fn = collate_tracklets

    def images_in_batches(self) -> set[int]:
        dataset = self.train_loader.dataset
        if dataset.sample_method == "all":
            return set()
        return {number * dataset.seq_len for number in super().images_in_batches()}  # type: ignore[misc]

    def parse_data_for_train(self, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
        frames, lengths = _frames(data["img"])
        return frames, data["pid"].repeat_interleave(lengths)

    def parse_cameras(self, data: dict[str, Any]) -> Tensor:
        return data["camid"].repeat_interleave(_frames(data["img"])[1])

    def local_mean_scale(self, pids: Tensor) -> float:
        return distributed.local_mean_scale(len(pids), pids.device)

    def extract_features(self, images: Tensor) -> Tensor:
        frames, lengths = _frames(images)
        pool = POOLING[self.pooling_method]
        return torch.stack([pool(features) for features in self.model(frames).split(lengths.tolist())])
