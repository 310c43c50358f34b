"""Changes networks of torchreid's zoo in place: the batch normalisation neck and the last stride."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pml_drsl.checks import InputError
from torchreid_ext.runtime import distributed


@dataclass(frozen=True)
class Head:
    """Features before and after a neck, each of shape (N, D), and the logits, shape (N, classes)."""

    before: Tensor
    after: Tensor
    logits: Tensor


class NeckClassifier(nn.Linear):
    """A classifier without bias behind a batch normalisation without shift, the neck.

    The metric loss gets the features before the neck; cross-entropy and retrieval get the features after the neck (Luo
    et al., "A strong baseline and batch normalization neck", TMM 2019).

    Args:
        classifier: the linear layer that this layer replaces.
    """

    def __init__(self, classifier: nn.Linear) -> None:
        super().__init__(classifier.in_features, classifier.out_features, bias=False)
        nn.init.normal_(self.weight, std=0.001)
        self.neck = nn.BatchNorm1d(classifier.in_features)
        # A bias that is frozen at zero would be trained by an engine that unfreezes all layers.
        self.neck.register_parameter("bias", None)

    def forward(self, features: Tensor) -> Head:  # type: ignore[override]
        after = self.neck(features)
        return Head(features, after, super().forward(after))


class _WithNeck(nn.Module):
    """Mixed into the class of a network whose classifiers are ``NeckClassifier``."""

    loss: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that pickle cannot find it by its name: it is made again when it is read.
        reduced: Any = super().__reduce_ex__(protocol)
        _, kind = type(self).__bases__
        return (_blank, (kind,), *reduced[2:])

    def forward(self, images: Tensor) -> Any:
        # The networks of the zoo return the output of their classifiers only in training. This switches the mode of
        # the network alone: its layers keep their mode.
        mode, self.training = self.training, True
        try:
            output = super().forward(images)
        finally:
            self.training = mode
        given = output if self.loss == "softmax" else output[0]
        heads: list[Head] = list(given) if isinstance(given, (list, tuple)) else [given]
        if not mode:
            return torch.cat([head.after for head in heads], 1)
        logits = _one_or_all([head.logits for head in heads])
        return logits if self.loss == "softmax" else (logits, _one_or_all([head.before for head in heads]))


@functools.cache
def _class_with_neck(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of networks of ``kind`` with a neck, always the same class for the same ``kind``."""
    return type(f"{kind.__name__}WithNeck", (_WithNeck, kind), {})


def _blank(kind: Any) -> nn.Module:
    """A network of ``kind`` with a neck that has no attributes yet: pickle and copy add them."""
    made = _class_with_neck(kind)
    return made.__new__(made)


def _one_or_all(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    return tensors[0] if len(tensors) == 1 else tensors


def add_neck(model: nn.Module) -> None:
    """Puts a neck before each classifier of a network of the zoo, in place.

    In training the network returns its logits, and also the features before the necks if it was built with
    ``loss="triplet"``. In evaluation it returns the features after the necks, concatenated. A network with several
    classifiers (``pcb_p6``: one for each part; ``hacnn``: global and local) has one feature for each classifier. The
    layers keep their names, so that weights of the network without a neck load; only the biases of the classifiers are
    gone.

    Raises:
        InputError: for a network without a linear layer named ``classifier...``.
    """
    found = False
    for name, child in list(model.named_children()):
        if not name.startswith("classifier"):
            continue
        if isinstance(child, nn.Linear):
            setattr(model, name, NeckClassifier(child))
            found = True
        elif isinstance(child, nn.ModuleList) and all(isinstance(part, nn.Linear) for part in child):
            setattr(model, name, nn.ModuleList(NeckClassifier(part) for part in child))  # type: ignore[arg-type]
            found = True
    kind: Any = type(model)
    if not found:
        raise InputError(
            f"model.bnneck: {kind.__name__} has no linear layer named classifier to put a neck before; set it to False"
        )
    model.__class__ = _class_with_neck(kind)


def set_last_stride(model: nn.Module, name: str) -> None:
    """Sets the stride of the last stage of a network to 1, in place, so that the stage keeps its resolution.

    Args:
        model: a network whose last stage is named ``layer4``, as in every kind of ResNet.
        name: name of the network for messages.

    Raises:
        InputError: for a network without a ``layer4``.
    """
    stage = getattr(model, "layer4", None)
    if not isinstance(stage, nn.Module):
        raise InputError(
            f"model.last_stride 1 is for networks whose last stage is a layer4 (resnet*, resnext*, se_res*, pcb_*); "
            f"{name} has none: leave it at 2, which changes nothing"
        )
    for layer in stage.modules():
        if isinstance(layer, (nn.Conv2d, nn.AvgPool2d)):
            layer.stride = (1, 1)


@torch.no_grad()
def feature_sizes(model: nn.Module, height: int, width: int) -> list[int]:
    """The dimension of each feature that a network built with ``loss="triplet"`` returns in training.

    One black image is passed through the network. The state of the network does not change.

    Args:
        model: the network.
        height: height of its images in pixels.
        width: width of its images in pixels.
    """
    network = distributed.unwrapped(model)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    # Only the network itself is in training mode, so that it returns its features. Its layers stay in evaluation mode
    # and gather no statistics.
    network.training = True
    try:
        parameter = next(network.parameters())
        _, features = network(torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype))
    finally:
        for module, mode in modes:
            module.training = mode
    return [part.shape[1] for part in (features if isinstance(features, (list, tuple)) else [features])]
