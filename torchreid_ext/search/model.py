"""Loads a trained network, and everything that is needed to use it, from a checkpoint alone."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pml_drsl.checks import InputError
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.checkpoint.folder import BEST, LAST
from torchreid_ext.config import KEYS, Config, build_model, flat, get_default_config
from torchreid_ext.runtime import distributed

# The height and width for which torchreid's zoo trained a network, where they are not the default ones.
_SIZES = {"hacnn": (160, 64)}


@dataclass(frozen=True)
class TrainedModel:
    """A trained network in evaluation mode, with what its configuration says of its images and features.

    ``features`` may be called from several threads.

    Attributes:
        network: the network; it takes [N, 3, height, width] normalised images and returns [N, D] features.
        config: the configuration that the network was trained with.
        path: the checkpoint.
        fingerprint: 32 hexadecimal digits that differ between models whose features differ.
    """

    network: nn.Module
    config: Config
    path: str
    fingerprint: str
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    @property
    def height(self) -> int:
        """Height of the network's images in pixels."""
        return int(self.config.data.height)

    @property
    def width(self) -> int:
        """Width of the network's images in pixels."""
        return int(self.config.data.width)

    @property
    def metric(self) -> str:
        """``"euclidean"`` or ``"cosine"``: the distance by which the run was tested.

        Euclidean distances between features of unit norm give the order of cosine distances, so that
        ``test.normalize_feature`` makes it ``"cosine"``.
        """
        return "cosine" if self.config.test.normalize_feature else str(self.config.test.dist_metric)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The features of normalised images.

        Args:
            images: [N, 3, height, width].

        Returns:
            [N, D] features on the CPU.
        """
        # A network with a neck changes its mode inside its forward pass, which two threads must not do at once.
        with self._lock:
            return self.network(images.to(self.device)).cpu()


def load_model(
    path: str | os.PathLike[str],
    config_file: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    model: str | None = None,
) -> TrainedModel:
    """Loads a checkpoint with its configuration, or another one by the name of its network or a configuration file.

    Args:
        path: the checkpoint, for example ``log/demo/model/model-best.pth.tar``, or the folder of a run, whose best
            checkpoint is taken.
        config_file: a YAML file of torchreid's keys and ours. It overrides the configuration in the checkpoint.
        device: where to compute; None takes the GPU where there is one.
        model: name of the network. With neither a configuration in the checkpoint nor a file, the rest is what
            torchreid's zoo was trained with, which stderr says: its size of images, ImageNet's normalisation and cosine
            distance.

    Raises:
        InputError: for a checkpoint that is missing, damaged, without a configuration or not of the network that its
            configuration names, and for a device that is not there.
    """
    path = find_checkpoint(path)
    state = checkpoint.load(path)
    config = _config(path, state, config_file, model)
    weights = _weights(path, state)
    network = build_model(config, _num_classes(weights))
    _load(path, network, weights, config.model.name)
    fingerprint = _fingerprint(network, config)
    return TrainedModel(network.eval().to(_device(device)), config, path, fingerprint)


def find_checkpoint(path: str | os.PathLike[str]) -> str:
    """The checkpoint itself, or the best or else the last checkpoint in the folder of a run.

    Raises:
        InputError: for a folder without one.
    """
    folder = Path(path)
    if not folder.is_dir():
        return os.fspath(path)
    for place in (folder / "model", folder):
        for name in (BEST, LAST):
            if (place / name).is_file():
                return str(place / name)
    raise InputError(f"the folder {os.fspath(path)!r} holds no model/{BEST}: give a checkpoint, or the folder of a run")


def _config(
    path: str, state: Mapping[str, Any], config_file: str | os.PathLike[str] | None, model: str | None
) -> Config:
    config = get_default_config()
    training = state.get("training")
    saved = training.get("config") if isinstance(training, Mapping) else None
    if not saved and config_file is None and model is None:
        beside = Path(path).absolute().parent.parent / "config.yaml"
        found = f", for example {str(beside)!r}" if beside.is_file() else ""
        raise InputError(
            f"checkpoint {path!r} holds no configuration, so its network is unknown: give --model NAME (model in "
            f"Python) for weights of torchreid's zoo, for example osnet_x0_25, or --config-file FILE (config_file in "
            f"Python), the YAML file that the network was trained with{found}"
        )
    if saved:
        _merge(config, saved, path)
    if config_file is not None:
        config.merge_from_file(Path(config_file))
    if model is not None:
        config.model.name = model
        if not saved and config_file is None:
            config.data.height, config.data.width = _SIZES.get(model, (config.data.height, config.data.width))
            config.test.dist_metric = "cosine"
            _note(
                f"{path!r} holds no configuration: taking {model} with images of {config.data.height} x "
                f"{config.data.width} pixels, ImageNet's normalisation and cosine distance, unless --config-file says "
                f"otherwise"
            )
    # The weights come from the checkpoint, and the device is chosen here.
    config.model.pretrained = config.use_gpu = config.train.sync_batchnorm = False
    return config


def _merge(config: Config, saved: object, path: str) -> None:
    """Takes over a saved configuration; keys and values of another version of this package are named and left out."""
    if not isinstance(saved, Mapping):
        raise InputError(f"checkpoint {path!r} is damaged: its configuration is no mapping; give --config-file FILE")
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


def _weights(path: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    held = state.get("state_dict", state)
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise InputError(f"checkpoint {path!r} holds no weights: it needs a dictionary of tensors")
    return {str(name).removeprefix("module."): value for name, value in held.items()}


def _num_classes(weights: Mapping[str, Tensor]) -> int:
    """The number of identities that the network was trained on: the rows of its last classifier."""
    rows = [len(value) for name, value in weights.items() if "classifier" in name and value.ndim > 1]
    return rows[-1] if rows else 1


def _load(path: str, network: nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    own = network.state_dict()
    # Versions of torch before 0.4.1 did not count batches, and a network in evaluation mode does not need the count.
    wrong = [key for key in own if not key.endswith("num_batches_tracked") and key not in weights]
    wrong += [key for key, value in weights.items() if key not in own or own[key].shape != value.shape]
    if wrong:
        raise InputError(
            f"checkpoint {path!r} is not of {name!r} as its configuration describes it: {len(wrong)} "
            f"weights are missing, too many or of another shape, for example {wrong[0]!r}. Check model.name, "
            f"model.bnneck and model.last_stride of the configuration"
        )
    network.load_state_dict(dict(weights), strict=False)


def _fingerprint(network: nn.Module, config: Config) -> str:
    digest = hashlib.sha256()
    settings = [value for key, value in flat(config).items() if key in KEYS and KEYS[key].features]
    digest.update(repr(settings).encode())
    for name, value in sorted(network.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _device(wanted: torch.device | str | None) -> torch.device:
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {str(device)!r}: torch finds no CUDA device here; use 'cpu'")
    return device
