"""The training batch that every engine takes its step on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A training batch, or one process's share of it.

    Attributes:
        images: what the network takes, shape (N, C, H, W).
        pids: identity of each image, shape (N,), integer.
        camids: camera of each image, shape (N,), integer; None if the loader does not give the cameras.
    """

    images: Tensor
    pids: Tensor
    camids: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        camids = None if self.camids is None else self.camids.to(device, non_blocking=True)
        return Batch(self.images.to(device, non_blocking=True), self.pids.to(device, non_blocking=True), camids)


def views_as_images(images: Tensor | Sequence[Tensor]) -> Tensor:
    """The augmented views of a batch as images: view 0 of the first image, view 1 of the first image, and so on.

    The views of an image stay together. The batches of all processes, one after the other, then have the order that
    the batch of one process has, which matters to a cross-batch memory.

    Args:
        images: the images, shape (N, C, H, W); with torchreid's ``k_tfm`` above 1, a list of k such tensors.

    Returns:
        All views, shape (k * N, C, H, W).
    """
    if isinstance(images, Tensor):
        return images
    return torch.stack(list(images), dim=1).flatten(0, 1)


def for_each_view(labels: Tensor, images: Tensor | Sequence[Tensor]) -> Tensor:
    """The labels of a batch, shape (N,), repeated for the views that ``views_as_images`` returns, shape (k * N,)."""
    return labels if isinstance(images, Tensor) else labels.repeat_interleave(len(images))
