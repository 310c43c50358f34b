"""The networks that the benchmark trains, and the recipe by which it trains them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pml_drsl.checks import InputError

PRECISIONS = ("float32", "bfloat16")
CONV4 = "conv4"


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on a data set; the same for every loss.

    Attributes:
        network: ``"conv4"``, or the name of a torchreid model.
        dim: size of conv4's embedding.
        weights: digest of the file of starting weights, from ``--weights``; empty for a random start.
        epochs: times the training set is shown.
        identities: identities in a batch, or as many as there are.
        instances: images of each identity in a batch; an identity with fewer images has some of them twice.
        views: how often each image stands in its batch, each time augmented anew.
        lr: learning rate of the network; Adam, falling to 0 along a cosine.
        weight_decay: of the network, added to the gradient.
        warmup: epochs in which the learning rate first rises, linearly.
        augmentation: a key of ``STRENGTHS``.
        mirror: mirror half of the images.
        precision: of the convolutions, ``"float32"`` or ``"bfloat16"``; embeddings and loss are float32.
    """

    network: str = CONV4
    dim: int = 128
    weights: str = ""
    epochs: int = 40
    identities: int = 16
    instances: int = 4
    views: int = 1
    lr: float = 2e-3
    weight_decay: float = 0.0
    warmup: int = 0
    augmentation: str = "strong"
    mirror: bool = False
    precision: str = "float32"

    def but(self, **changes: Any) -> Recipe:
        return dataclasses.replace(self, **changes)


class _Conv4(nn.Module):
    """Four blocks of 3 x 3 convolution with stride 2, normalisation and ReLU, 64 wide, and a linear layer: the network
    for Omniglot of Finn et al., "Model-Agnostic Meta-Learning", ICML 2017."""

    def __init__(self, channels: int, height: int, width: int, dim: int, precision: str) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for into in (channels, 64, 64, 64):
            blocks += [nn.Conv2d(into, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks, nn.Flatten())
        self.embedding = nn.Linear(64 * math.ceil(height / 16) * math.ceil(width / 16), dim)
        self.in_bfloat16 = precision == "bfloat16"

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            x = self.blocks(x)
        return self.embedding(x.float())  # type: ignore[no-any-return]


class _Features(nn.Module):
    """A torchreid model that returns features in training too."""

    def __init__(self, name: str, identities: int, precision: str) -> None:
        super().__init__()
        import torchreid

        self.model = torchreid.models.build_model(name, identities, loss="triplet", pretrained=False)
        self.in_bfloat16 = precision == "bfloat16"

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            found = self.model(x)
        features: Tensor = found[1] if isinstance(found, tuple) else found
        return features.float()


def make_network(recipe: Recipe, shape: tuple[int, int, int], identities: int, weights: Path | None) -> nn.Module:
    """A network for images of ``shape`` (channels, height, width), with the starting weights of a file.

    Raises:
        InputError: for a network that does not exist, or a file whose weights are not the network's.
    """
    if recipe.network == CONV4:
        network: nn.Module = _Conv4(*shape, recipe.dim, recipe.precision)
    else:
        try:
            network = _Features(recipe.network, identities, recipe.precision)
        except KeyError as error:
            raise InputError(f"network {recipe.network}: {error.args[0]}") from None
    if weights is not None:
        _load(network.model if isinstance(network, _Features) else network, weights)
    return network.to(memory_format=torch.channels_last)


def embedding_size(network: nn.Module, shape: tuple[int, int, int], device: str) -> int:
    with torch.no_grad():
        return int(network.eval()(torch.zeros(1, *shape, device=device)).shape[1])


def _load(network: nn.Module, path: Path) -> None:
    """Loads a state dict, or a checkpoint that holds one. Only the classifier may be missing, or of other shape."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("state_dict", found)
        found = {name.removeprefix("module."): weight for name, weight in found.items()}
    except Exception as error:  # torch raises half a dozen types for a file that is no checkpoint
        raise InputError(f"--weights {path} cannot be read as weights: {error}") from None
    own = network.state_dict()
    optional = {name for name in own if name.startswith("classifier.") or name.endswith("num_batches_tracked")}
    fits = {name: found[name] for name in own if name in found and found[name].shape == own[name].shape}
    missing = sorted(set(own) - set(fits) - optional)
    if missing:
        raise InputError(
            f"--weights {path} does not fit the network: it lacks {missing[0]}, or has it in another shape "
            f"({len(missing)} of {len(own)} such weights)"
        )
    network.load_state_dict(fits, strict=False)


STRENGTHS: dict[str, tuple[float, float, float, float]] = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "weak": (0.0, 0.1, 0.0, 0.1),
    "strong": (math.pi / 8, 0.3, 0.3, 0.22),
}
"""Augmentations: largest turn (radians), stretch (share), shear and shift (share of half the size) of an image.

``strong`` did best beside cross-entropy, on validation identities of Omniglot; ``weak`` is for photographs of people.
"""


def augmented(x: Tensor, strength: str, mirror: bool, generator: torch.Generator) -> Tensor:
    """Images, shape (N, channels, height, width), each turned, stretched, sheared and shifted at random."""
    turn, stretch, slant, shift = STRENGTHS[strength]

    def draw(largest: float) -> Tensor:
        return (2 * torch.rand(len(x), generator=generator) - 1) * largest

    angle, wide, high, shear = draw(turn), 1 + draw(stretch), 1 + draw(stretch), draw(slant)
    right, down = draw(shift), draw(shift)
    if mirror:
        wide = wide * torch.where(draw(1) < 0, -1, 1)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * wide, (shear * cos - sin) * high, right], 1),
        torch.stack([sin * wide, (shear * sin + cos) * high, down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
