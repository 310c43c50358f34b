"""A trained network in use: it is loaded from a checkpoint alone, and prepares its images itself."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

from pml_drsl.checks import InputError
from pml_drsl.evaluation import Metric
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.checkpoint.folder import BEST, LAST
from torchreid_ext.config import KEYS, Config, build_model, flat, get_default_config
from torchreid_ext.evaluation.page import Box
from torchreid_ext.pixels import check_not_empty, read_image
from torchreid_ext.runtime import distributed

File: TypeAlias = "str | os.PathLike[str]"
ImageLike: TypeAlias = "File | Image.Image | np.ndarray[Any, Any] | Tensor"
"""One image: a path, a PIL image or an array, as :func:`torchreid_ext.pixels.read_image` takes them; or a [3, H, W]
tensor, uint8 or floating in [0, 1]. It is not normalised yet."""

# The height and width for which torchreid's zoo trained a network, where they are not the default ones.
_SIZES = {"hacnn": (160, 64)}


class NoConfiguration(InputError):
    """A checkpoint does not say which network it is."""


@dataclass(frozen=True)
class TrainedModel:
    """A trained network in evaluation mode, with what its configuration says of its images and features."""

    network: nn.Module  # from [N, 3, height, width] normalised images to [N, D] features
    config: Config  # with which the network was trained
    path: str  # of the checkpoint
    fingerprint: str  # 32 hexadecimal digits that differ between models whose features differ
    people: frozenset[str] = frozenset()  # of configured data sets that it was trained on, by ``config.data.person``
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    @property
    def metric(self) -> Metric:
        """The distance by which the run was tested. ``test.normalize_feature`` makes it ``"cosine"``, because both give
        features of unit norm one order."""
        return "cosine" if self.config.test.normalize_feature else self.config.test.dist_metric

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The features, [N, D] on the CPU, of normalised images, [N, 3, height, width]; for any thread."""
        # A network with a neck changes its mode inside its forward pass, which two threads must not do at once.
        with self._lock:
            return self.network(images.to(self.device)).cpu()


class Preprocessing:
    """Resizes and normalises images as the test of the run with this configuration did, in any process."""

    def __init__(self, config: Config) -> None:
        self.size = [int(config.data.height), int(config.data.width)]
        self.mean, self.std = list(config.data.norm_mean), list(config.data.norm_std)

    def resized(self, image: ImageLike, crop: Box | None = None) -> Tensor:
        """[3, height, width] values in [0, 1] of one image, or of its part ``crop``. Raises InputError if it cannot be
        read, for an array or a tensor of another shape, type or range, and for a crop outside the image."""
        if not isinstance(image, (str, os.PathLike, Image.Image, np.ndarray, Tensor)):
            wanted = "give a path, a PIL image, an array or a tensor"
            raise InputError(f"a {type(image).__name__} is not an image: {wanted}")
        given = _from_tensor(image.detach().cpu()) if isinstance(image, Tensor) else read_image(image)
        if crop is not None:
            (left, top, right, bottom), (width, height) = crop, transforms.get_image_size(given)
            if not (0 <= left < right <= width and 0 <= top < bottom <= height):
                size = f"{width} pixels wide and {height} high"
                area = f"crop {left} {top} {right} {bottom} (left, top, right, bottom)"
                raise InputError(f"{area} does not lie within the image, which is {size}")
            given = transforms.crop(given, top, left, bottom - top, right - left)
        if isinstance(given, Image.Image):
            return transforms.to_tensor(transforms.resize(given, self.size))
        return transforms.resize(given, self.size, antialias=True).clamp(0, 1)

    def normalised(self, images: Tensor) -> Tensor:
        """[..., 3, height, width] normalised images from values in [0, 1]."""
        return transforms.normalize(images, self.mean, self.std)

    def __call__(self, image: ImageLike, crop: Box | None = None) -> Tensor:
        """[3, height, width]: the resized and normalised image; see :meth:`resized`."""
        return self.normalised(self.resized(image, crop))


def as_list(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """A list of images from one image, several images, or a batch in one array or tensor of four dimensions."""
    if isinstance(images, (Tensor, np.ndarray)):
        return list(images) if images.ndim == 4 else [images]
    return [images] if isinstance(images, (str, os.PathLike, Image.Image)) else list(images)


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
        cure = "give values in [0, 1], which are normalised here with the model's own mean and standard deviation"
        raise InputError(f"a tensor with values from {lowest:.3g} to {highest:.3g} is not an image: {cure}")
    return image.float()


def load_model(
    path: File, config_file: File | None = None, device: torch.device | str | None = None, model: str | None = None
) -> TrainedModel:
    """Loads a checkpoint with its configuration, or another one by the name of its network or a configuration file.

    Args:
        path: the checkpoint, or the folder of a run, whose best checkpoint is taken.
        config_file: a YAML file of torchreid's keys and ours. It overrides the configuration in the checkpoint.
        device: where to compute; None takes the GPU where there is one.
        model: name of the network. With neither a configuration in the checkpoint nor a file, image size
            and normalisation are those of torchreid's zoo, and the distance is the cosine, which stderr says.

    An InputError refuses a checkpoint that is missing, damaged, without a configuration or not of the network that its
    configuration names, and a device that is not there."""
    path = find_checkpoint(path)
    state = checkpoint.load(path)
    config, note = _config(path, state, config_file, model)
    weights = checkpoint.weights_of(state, path)
    # The rows of the last classifier are the identities that the network was trained on.
    rows = [len(value) for name, value in weights.items() if "classifier" in name and value.ndim > 1]
    network = build_model(config, rows[-1] if rows else 1)
    checkpoint.fit_weights(network, weights, path, config.model.name)
    fingerprint = _fingerprint(network, config)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"device {device!r} is none of torch's: use 'cpu', 'cuda' or 'cuda:1'") from error
    if place.type == "cuda" and (place.index or 0) >= (number := torch.cuda.device_count()):
        raise InputError(f"device {str(place)!r}: torch finds {number} CUDA devices here; use 'cpu', or count from 0")
    people = checkpoint.people_of(state) if config_file is None else frozenset[str]()
    if note:
        _note(note)
    return TrainedModel(network.eval().to(place), config, path, fingerprint, people)


def find_checkpoint(path: File) -> str:
    """The checkpoint itself, or the best or else the last one in the folder of a run; InputError if there is none."""
    folder, name = Path(path), os.fspath(path)
    if folder.is_file():
        return name
    for place in (folder / "model" / BEST, folder / "model" / LAST, folder / BEST, folder / LAST):
        if place.is_file():
            return str(place)
    fault = f"the folder {name!r} holds no model/{BEST}" if folder.is_dir() else f"checkpoint {name!r} does not exist"
    raise InputError(f"{fault}: give a checkpoint, or the folder of a run")


def _config(path: str, state: Mapping[str, Any], config_file: File | None, model: str | None) -> tuple[Config, str]:
    """The configuration of a network, and what to tell the user of it once the network is loaded."""
    config, note = get_default_config(), ""
    training = state.get("training")
    saved = training.get("config") if isinstance(training, Mapping) else None
    if not saved and config_file is None and model is None:
        beside = Path(path).absolute().parent.parent / "config.yaml"
        found = f", for example {str(beside)!r}" if beside.is_file() else ""
        zoo = "--model NAME (model in Python) for weights of torchreid's zoo, for example osnet_x0_25"
        file = f"--config-file FILE (config_file in Python), the YAML file that the network was trained with{found}"
        unknown = f"checkpoint {path!r} holds no configuration, so its network is unknown"
        raise NoConfiguration(f"{unknown}: give {zoo}, or {file}")
    if saved:
        _merge(config, saved, path)
    if config_file is not None:
        config.merge_from_file(Path(config_file))
    if model is not None:
        config.merge_from_list(["model.name", model])
        if not saved and config_file is None:
            config.data.height, config.data.width = _SIZES.get(model, (config.data.height, config.data.width))
            config.test.dist_metric = "cosine"
            size = f"{config.data.height} x {config.data.width} pixels"
            taken = f"{model} with images of {size}, its usual normalisation and the cosine distance"
            note = f"{path!r} holds no configuration: taking {taken}, unless --config-file says otherwise"
    # The weights come from the checkpoint, and the device is chosen by load_model.
    config.model.pretrained = config.use_gpu = config.train.sync_batchnorm = False
    return config, note


def _merge(config: Config, saved: object, path: str) -> None:
    """Takes over a saved configuration; what another version of this package wrote is named and left out."""
    if not isinstance(saved, Mapping):
        damaged = f"checkpoint {path!r} is damaged: its configuration is no mapping"
        raise NoConfiguration(f"{damaged}; give --config-file FILE")
    ignored = []
    for key, value in saved.items():
        try:
            # A string is read as Python writes it, or a folder named 2024 would become a number.
            config.merge_from_list([str(key), repr(value) if isinstance(value, str) else value])
        except InputError:
            ignored.append(str(key))
    if ignored:
        _note(f"{path!r} was written by another version, and these keys were ignored: {', '.join(sorted(ignored))}")


def _note(text: str) -> None:
    if distributed.is_first():
        print(text, file=sys.stderr)


def _fingerprint(network: nn.Module, config: Config) -> str:
    # Sorted, so that another order of the keys leaves every index readable.
    settings = [value for key, value in sorted(flat(config).items()) if key in KEYS and KEYS[key].features]
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
