"""Refuses losses, miners, optimizers and networks that an engine cannot train together, before training starts."""

from __future__ import annotations

from typing import Any

from pytorch_metric_learning import losses
from torch import nn
from torch.optim import Optimizer

from pml_drsl.checks import InputError
from torchreid_ext.engine.criteria import WITHOUT_PAIRS
from torchreid_ext.runtime import distributed


def check_criterion(criterion: Any, optimizer: Optimizer, miner: nn.Module | None, cross_camera: bool) -> None:
    """Refuses a criterion, or a loss inside it, that an engine could not train with, or whose weights the optimizer
    does not have. Raises InputError, naming the loss, the reason and the fix."""
    if not isinstance(criterion, nn.Module):
        raise InputError(f"criterion must be a loss of pytorch_metric_learning, got {criterion!r}")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(p.requires_grad and id(p) not in trained for p in criterion.parameters()):
        made = "make the optimizer with build_optimizer(cfg, model, criterion)"
        added = "call optimizer.add_param_group({'params': criterion.parameters()})"
        untrained = f"{type(criterion).__name__} has weights that the optimizer does not train"
        raise InputError(f"{untrained}; {made}, or {added}")
    for loss in _parts(criterion, WITHOUT_PAIRS) if cross_camera else []:
        in_memory = isinstance(loss, losses.CrossBatchMemory)
        why = f"{type(loss).__name__} {'does not know the cameras in its memory' if in_memory else 'takes no pairs'}"
        raise InputError(f"cross_camera chooses the pairs of the loss, and {why}; turn cross_camera off")
    sums = _parts(criterion, losses.MultipleLosses)
    if (miner is not None or cross_camera) and any(each.miners for each in sums):
        cure = "give the engine neither miner nor cross_camera, or give MultipleLosses no miners"
        raise InputError(f"MultipleLosses has miners of its own and takes no other pairs: {cure}")
    mined = [] if miner is None else [criterion]
    for each in sums:
        if each.miners is not None:
            names = each.miners.keys() if each.is_dict else range(len(each.miners))
            mined += [each.losses[name] for name in names if each.miners[name] is not None]
    if any(_parts(loss, losses.CrossBatchMemory) for loss in mined):
        misread = "a miner gives indices of images of the batch, and the CrossBatchMemory reads them as of its memory"
        cure = "give it to the memory, CrossBatchMemory(..., miner=...), and none to the engine or to MultipleLosses"
        raise InputError(f"{misread}: {cure}")


def check_returns_features(model: nn.Module) -> None:
    """Refuses a network of torchreid's zoo that was built for another loss, and returns logits alone. With two heads it
    returns two logits, which look like logits and features. Raises InputError, saying how to build the network."""
    network = distributed.unwrapped(model)
    built_for = getattr(network, "loss", "triplet")
    # A network of the user's own may have any attribute of this name.
    of_the_zoo = type(network).__module__.startswith("torchreid.")
    if built_for == "softmax" or (of_the_zoo and built_for != "triplet"):
        cure = "build it with torchreid.models.build_model(..., loss='triplet')"
        raise InputError(f"the model was built with loss={built_for!r} and returns no features in training; {cure}")


def loss_that_compares_images(criterion: nn.Module) -> str | None:
    """The name of a loss in the criterion that compares the images of a batch with each other; None if there is none. A
    loss with weights (ArcFace, proxies) compares the images with its weights instead."""
    parts = _parts(criterion, losses.BaseMetricLossFunction) or [criterion]
    return next((type(loss).__name__ for loss in parts if not any(p.requires_grad for p in loss.parameters())), None)


def compares_directions(criterion: nn.Module) -> bool:
    """Whether a loss of pytorch-metric-learning in the criterion scales the features to unit norm."""
    parts = _parts(criterion, losses.BaseMetricLossFunction)
    return any(getattr(getattr(part, "distance", None), "normalize_embeddings", False) for part in parts)


def _parts(criterion: nn.Module, kinds: Any) -> list[Any]:
    return [part for part in criterion.modules() if isinstance(part, kinds)]
