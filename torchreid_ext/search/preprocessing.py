"""Turns images of any kind into the input of a network: files, PIL images, numpy arrays and tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as transforms

from pml_drsl.checks import InputError
from torchreid_ext.pixels import check_not_empty, read_image
from torchreid_ext.search.model import TrainedModel

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray[Any, Any] | Tensor"
"""One image: a path, a PIL image or an array, as :func:`torchreid_ext.pixels.read_image` takes them; or a [3, H, W]
tensor, uint8 or floating in [0, 1]. It is not normalised yet."""

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of an image in pixels, right and bottom excluded."""


class Preprocessing:
    """Resizes and normalises images as the run's test did.

    Args:
        model: the model whose configuration gives size, mean and standard deviation.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.size = [model.height, model.width]
        self.mean, self.std = list(model.config.data.norm_mean), list(model.config.data.norm_std)

    def resized(self, image: ImageLike, crop: Box | None = None) -> Tensor:
        """[3, height, width] values in [0, 1] of one image.

        Args:
            image: the image.
            crop: the part of the image to use; None for the whole image.

        Raises:
            InputError: for an image that cannot be read, an array or a tensor of another shape, type or range, or a
                crop that does not lie within the image.
        """
        given = as_image(image)
        if isinstance(given, Image.Image):
            part = given if crop is None else given.crop(_checked(crop, given.width, given.height))
            return transforms.to_tensor(transforms.resize(part, self.size))
        if crop is not None:
            left, top, right, bottom = _checked(crop, given.shape[2], given.shape[1])
            given = given[:, top:bottom, left:right]
        return transforms.resize(given, self.size, antialias=True).clamp(0, 1)

    def normalised(self, images: Tensor) -> Tensor:
        """[..., 3, height, width] normalised images from values in [0, 1]."""
        return transforms.normalize(images, self.mean, self.std)

    def __call__(self, image: ImageLike, crop: Box | None = None) -> Tensor:
        """[3, height, width]: the resized and normalised image; see :meth:`resized`."""
        return self.normalised(self.resized(image, crop))


def as_image(image: ImageLike) -> Image.Image | Tensor:
    """An upright RGB image, or a [3, H, W] float32 tensor in [0, 1] where the image is a floating tensor.

    Raises:
        InputError: as :meth:`Preprocessing.resized`.
    """
    if isinstance(image, (str, os.PathLike, Image.Image, np.ndarray)):
        return read_image(image)
    if isinstance(image, Tensor):
        return _from_tensor(image.detach().cpu())
    raise InputError(f"a {type(image).__name__} is not an image: give a path, a PIL image, an array or a tensor")


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """A list of images from one image, several images, or a batch in one array or tensor of four dimensions."""
    if isinstance(images, (Tensor, np.ndarray)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    return list(images)


def _from_tensor(image: Tensor) -> Image.Image | Tensor:
    if image.ndim != 3 or image.shape[0] != 3:
        raise InputError(f"a tensor of shape {list(image.shape)} is not an image: give [3, H, W], or [N, 3, H, W]")
    check_not_empty(image.shape)
    if image.dtype == torch.uint8:
        return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if not image.is_floating_point():
        raise InputError(f"a tensor of type {image.dtype} is not an image: give uint8, or floating values in [0, 1]")
    lowest, highest = float(image.min()), float(image.max())
    if not (lowest >= 0 and highest <= 1):
        raise InputError(
            f"a tensor with values from {lowest:.3g} to {highest:.3g} is not an image: give values in [0, 1], which "
            f"are normalised here with the model's own mean and standard deviation"
        )
    return image.float()


def _checked(crop: Box, width: int, height: int) -> Box:
    left, top, right, bottom = crop
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"crop {left} {top} {right} {bottom} (left, top, right, bottom) does not lie within the image, which is "
            f"{width} pixels wide and {height} high"
        )
    return crop
