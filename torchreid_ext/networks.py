"""The networks: torchreid's zoo and timm's, the batch normalisation neck, the last stride and the memory format."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torchreid
from torch import Tensor, nn

from pml_drsl.checks import InputError, nearest
from torchreid_ext.checkpoint import states
from torchreid_ext.runtime import distributed, generators

TIMM = "timm/"  # stands before the name of a network of timm


def check_known(name: str) -> None:
    """Raises InputError for the name of a network that neither torchreid's zoo nor, as ``timm/NAME``, timm has."""
    zoo = vars(torchreid.models)["__model_factory"]
    if name.startswith(TIMM):
        _timm(name.removeprefix(TIMM))
    elif name not in zoo:
        unknown = f"model.name {name!r} is unknown; the nearest is {nearest(name, zoo)!r}"
        raise InputError(f"{unknown}, and drsl-train --list models has them all")


class TimmNetwork(nn.Module):
    """A network of timm that returns what the engines need, as networks of torchreid's zoo do.

    In training it returns the logits, shape (N, classes), or ``(logits, features)`` for ``loss="triplet"``; otherwise
    the features, shape (N, D). A network with position embeddings is made for images of ``height`` and ``width``.
    ``pretrained`` weights need a network connection the first time. Raises InputError as ``timm_images``.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        loss: str = "triplet",
        pretrained: bool = False,
        height: int = 224,
        width: int = 224,
    ) -> None:
        super().__init__()
        timm, options = _timm(name), {"pretrained": pretrained, "num_classes": 0}
        try:
            self.backbone = timm.create_model(name, img_size=(height, width), **options)
        except TypeError:
            # A convolutional network takes images of any size.
            self.backbone = timm.create_model(name, **options)
        self.loss = loss
        size = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        self.classifier = nn.Linear(size, num_classes)

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        if not self.training:
            return features
        logits = self.classifier(features)
        return logits if self.loss == "softmax" else (logits, features)


def timm_images(name: str) -> tuple[tuple[int, int], list[float], list[float]]:
    """What a network of timm was trained on: height and width of its images, and the mean and deviation of channels.
    Raises InputError for an unknown name, or where timm is not installed."""
    timm = _timm(name)
    config = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()  # ImageNet's size and normalisation
    return config.input_size[1:], list(config.mean), list(config.std)


def _timm(name: str) -> Any:
    """The package timm, which knows a network of that name."""
    try:
        import timm
    except ModuleNotFoundError as error:
        cure = 'run pip install -e ".[reid,timm]" in the clone of this repository'
        raise InputError(f"model.name {TIMM}{name}: the package timm is not installed: {cure}") from error
    with contextlib.suppress(RuntimeError):  # of a tag that no weights have, at which is_model does not look
        if timm.is_model(name):
            timm.get_pretrained_cfg(name)
            return timm
    near = nearest(name, timm.list_models(pretrained="." in name))
    raise InputError(f"model.name: timm has no network {name!r}; did you mean {TIMM + near!r}?")


@dataclass(frozen=True)
class Head:
    """Features before and after a neck, each of shape (N, D), and the logits, shape (N, classes)."""

    before: Tensor
    after: Tensor
    logits: Tensor


class NeckClassifier(nn.Linear):
    """A classifier without bias behind a batch normalisation without shift, the neck; it replaces ``classifier``. The
    metric loss gets the features before the neck; cross-entropy and retrieval get the features after the neck (Luo et
    al., "A strong baseline and batch normalization neck", TMM 2019)."""

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
        # The zoo's networks return the output of their classifiers only in training. The layers keep their mode.
        mode, self.training = self.training, True
        try:
            output = super().forward(images)
        finally:
            self.training = mode
        given = output if self.loss == "softmax" else output[0]
        heads: list[Head] = list(given) if isinstance(given, (list, tuple)) else [given]
        if not mode:
            return torch.cat([head.after for head in heads], 1)
        logits: Any = [head.logits for head in heads]
        features: Any = [head.before for head in heads]
        if len(heads) == 1:
            logits, features = logits[0], features[0]
        return logits if self.loss == "softmax" else (logits, features)


@functools.cache
def _class_with_neck(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of networks of ``kind`` with a neck, always the same for the same ``kind``."""
    return type(f"{kind.__name__}WithNeck", (_WithNeck, kind), {})


def _blank(kind: Any) -> nn.Module:
    """A network of ``kind`` with a neck that has no attributes yet: pickle and copy add them."""
    made = _class_with_neck(kind)
    return made.__new__(made)


def add_neck(model: nn.Module) -> None:
    """Puts a neck before each classifier of a network of the zoo, in place.

    In training the network returns its logits, with ``loss="triplet"`` also the feature before each neck; in evaluation
    the features after the necks, concatenated. Weights of the network without a neck load, because the layers keep
    their names; only the biases of the classifiers are gone. Raises InputError for a network without a linear layer
    named ``classifier...``.
    """
    kind: Any = type(model)
    replaced: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if not name.startswith("classifier"):
            continue
        if isinstance(child, nn.Linear):
            replaced[name] = NeckClassifier(child)
        elif isinstance(child, nn.ModuleList) and all(isinstance(part, nn.Linear) for part in child):
            replaced[name] = nn.ModuleList(NeckClassifier(part) for part in child)  # type: ignore[arg-type]
    if not replaced:
        missing = f"{kind.__name__} has no linear layer named classifier to put a neck before"
        raise InputError(f"model.bnneck: {missing}; set it to False")
    for name, classifier in replaced.items():
        setattr(model, name, classifier)
    model.__class__ = _class_with_neck(kind)


def with_sync_batchnorm(model: nn.Module) -> nn.Module:
    """The network, whose batch normalisation in training is over the batch of all processes."""
    if not isinstance(model, TimmNetwork):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Many layers of timm are a normalisation with an activation, which torch's function would drop without a word.
    from timm import layers

    made: nn.Module = layers.convert_sync_batchnorm(model)  # type: ignore[attr-defined]
    return made.train(model.training)  # The new layers of timm 1.0.3 are in training mode.


def set_last_stride(model: nn.Module, name: str) -> None:
    """Sets the stride of the last stage of a network to 1, in place, so that the stage keeps its resolution. Raises
    InputError for a network, ``name``, without a ``layer4``, which every kind of ResNet has."""
    stage = getattr(getattr(model, "backbone", model), "layer4", None)
    if not isinstance(stage, nn.Module):
        taking = "networks whose last stage is a layer4 (resnet*, resnext*, se_res*, pcb_*)"
        raise InputError(f"model.last_stride 1 is for {taking}; {name} has none: leave it at 2, which changes nothing")
    for layer in stage.modules():
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
        elif isinstance(layer, nn.AvgPool2d):
            # It stands in the place of a stride: an average over one pixel.
            layer.kernel_size, layer.stride, layer.padding = 1, 1, 0
        elif type(layer).__name__.startswith("BlurPool"):
            raise InputError(f"model.last_stride 1: {name} blurs where it strides; leave it at 2")


@torch.inference_mode(False)  # in which a test may run: weights that are converted there could never train again
def set_memory_format(model: nn.Module, channels_last: bool | str, height: int, width: int, half: bool = False) -> None:
    """Lets a network, on its device, compute in the memory format ``channels_last``, in place, where that is asked for.

    Convolutions with converted weights convert their images. The values change by rounding alone. ``"auto"`` asks for
    it where it makes the network faster: on a CPU without instance normalisation, which converts images back and forth;
    on a GPU in ``half`` precision. Raises InputError for True and a network that cannot take the format.
    """
    if not channels_last or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return
    if channels_last == "auto":
        on_gpu = next(model.parameters()).is_cuda
        slower = any(isinstance(module, nn.modules.instancenorm._InstanceNorm) for module in model.modules())
        if slower or (on_gpu and not half):
            return
    network = distributed.unwrapped(model)
    network.to(memory_format=torch.channels_last)
    try:
        on_black_images(network, height, width, training=False)
    except Exception as error:
        # A network may refuse the image with any error.
        network.to(memory_format=torch.contiguous_format)
        if channels_last != "auto":
            refused = f"{type(network).__name__} cannot compute in this memory format"
            raise InputError(f"train.channels_last True: {refused}; set it to auto or False") from error


def heads(output: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The logits and the features of each head in what a network returns in training. Raises InputError if that is no
    pair of logits and features."""
    if not isinstance(output, (tuple, list)) or len(output) != 2:
        wanted = f"the model must return (logits, features) in training, got {type(output).__name__}"
        raise InputError(f"{wanted}; build a model of torchreid with loss='triplet'")
    logits, features = (list(part) if isinstance(part, (tuple, list)) else [part] for part in output)
    return logits, features


def feature_sizes(model: nn.Module, height: int, width: int) -> list[int]:
    """The dimension of each feature that a network gives in training; its state does not change. Raises InputError as
    ``heads``."""
    _, features = heads(on_black_images(model, height, width, training=True))
    return [part.shape[1] for part in features]


@torch.no_grad()
def on_black_images(
    model: nn.Module, height: int, width: int, training: bool, layers_train: bool = False, number: int = 1
) -> Any:
    """What a network returns for black images: in training mode its features too. Its layers are in evaluation mode,
    unless ``layers_train``. The network and the generators are left as they were."""
    network = distributed.unwrapped(model)
    modes = [(module, module.training) for module in network.modules()]
    restore_buffers, parameter = states.keep_buffers([network]), next(network.parameters())
    network.train(layers_train)
    network.training = training
    for module, _ in modes if training and not layers_train else ():
        # A part with parts of its own, such as a network that another one wraps, may be what returns the features.
        if [*module.children()] and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = True
    try:
        with generators.untouched():
            return network(torch.zeros(number, 3, height, width, device=parameter.device, dtype=parameter.dtype))
    finally:
        for module, mode in modes:
            module.training = mode
        restore_buffers()
