"""Builds the losses, miners, reducers and distances that a config describes, and refuses what cannot train together."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torchreid
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import distributed as pml_distributed
from pytorch_metric_learning.utils.module_with_records import ModuleWithRecords
from torch import Tensor, nn
from torch.optim import Optimizer

import pml_drsl.distances
import pml_drsl.losses
import pml_drsl.miners
import pml_drsl.reducers
from pml_drsl.checks import InputError, nearest
from torchreid_ext.runtime import distributed

NOT_TRAINED = {
    "BaseLossWrapper": "it is a base class",
    "BaseMetricLossFunction": "it is a base class",
    "GenericPairLoss": "it is a base class",
    "EmbeddingRegularizerMixin": "it is a part of other losses: give them an embedding_regularizer",
    "WeightRegularizerMixin": "it is a part of other losses: give them a weight_regularizer",
    "CrossBatchMemory": "it wraps a loss: set memory_size",
    "MultipleLosses": "it sums several losses, and a config describes one: give it to an engine from Python",
    "SelfSupervisedLoss": "it compares two views of an image and takes no identities",
    "VICRegLoss": "it compares two views of an image and takes no identities",
    "DynamicSoftMarginLoss": "in pytorch-metric-learning 2.9 its second batch fails, as its histogram keeps the first",
    "ManifoldLoss": "it makes up its own classes and takes no identities",
    "RankingMiner": "it is a base class",
    "EmbeddingsAlreadyPackagedAsTriplets": "it takes batches of triplets, which no sampler fills",
    "DoNothingReducer": "it returns the errors of all pairs, and not one number",
    "ClassWeightedReducer": "its weights are a tensor, which a config cannot hold: give it to a loss from Python",
}
"""Names of losses, miners and reducers that a config cannot use, with the reason."""

WITHOUT_PAIRS: tuple[type, ...] = (
    losses.CrossBatchMemory, losses.FastAPLoss, losses.InstanceLoss, losses.LargeMarginSoftmaxLoss, losses.NCALoss,
    losses.NormalizedSoftmaxLoss, losses.NPairsLoss, losses.P2SGradLoss, losses.PNPLoss, losses.ProxyAnchorLoss,
    losses.RankedListLoss, losses.SmoothAPLoss, losses.SoftTripleLoss,
)  # fmt: skip
"""Losses that cannot leave out the pairs that an ``indices_tuple`` leaves out. They refuse it, or take it for weights.
The memory would need the cameras of its embeddings, which it does not store."""


def _classes(base: type, *modules: ModuleType) -> dict[str, type]:
    """The subclasses of ``base`` in some modules, by name."""
    return {
        name: found
        for module in modules
        for name, found in vars(module).items()
        if inspect.isclass(found) and issubclass(found, base) and found is not base
        if name not in NOT_TRAINED and not name.startswith("_")
    }


TABLES: dict[str, dict[str, type]] = {
    "loss": _classes(losses.BaseMetricLossFunction, losses, pml_drsl.losses),
    "miner": _classes(miners.BaseMiner, miners, pml_drsl.miners),
    "reducer": _classes(reducers.BaseReducer, reducers, pml_drsl.reducers),
    "distance": _classes(distances.BaseDistance, distances, pml_drsl.distances),
    "regularizer": _classes(regularizers.BaseRegularizer, regularizers),
}
"""Every class that a config can name, by kind and name."""


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    """The named arguments of a class, including the arguments that it passes to its base class as ``**kwargs``.
    Required arguments of an abstract base class are left out, because its subclasses give them."""
    found: dict[str, inspect.Parameter] = {}
    for part in kind.__mro__:
        if "__init__" not in vars(part):
            continue
        own = list(inspect.signature(vars(part)["__init__"]).parameters.values())[1:]
        for p in own:
            left_out = part.__name__ in NOT_TRAINED and p.default is p.empty
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and not left_out:
                found.setdefault(p.name, p)
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


def _signature(kind: type) -> str:
    required_first = sorted(parameters(kind).values(), key=lambda p: p.default is not p.empty)
    listed = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in required_first)
    return f"{kind.__name__}({', '.join(listed)})"


def build(
    key: str, spec: Mapping[str, Any] | str, table: Mapping[str, type], from_the_data: Mapping[str, int] | None = None
) -> Any:
    """Builds the object that ``{"name": CLASS, ARGUMENT: VALUE, ...}`` or a name describes, as are values at any depth.

    The table has the known classes by name; ``from_the_data`` has values of required arguments that the description
    lacks. Raises InputError, with the config key, for an unknown name, a dotted path without a class, an unknown or
    missing argument (the message gives the signature), or a value that the class refuses.
    """
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    kind = named(key, name, table)
    known = parameters(kind)
    for argument in arguments:
        if argument not in known:
            raise InputError(f"{key}: {name} takes no {argument!r}; it is {_signature(kind)}")
    required = [p for p in known if known[p].default is inspect.Parameter.empty and p not in arguments]
    arguments |= {p: value for p, value in (from_the_data or {}).items() if p in required}
    if missing := [p for p in required if p not in arguments]:
        raise InputError(f"{key}: {name} needs {', '.join(missing)}; it is {_signature(kind)}")
    try:
        return kind(**{argument: _objects(f"{key}.{argument}", value) for argument, value in arguments.items()})
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError) and str(error).startswith(key):
            raise
        raise InputError(f"{key}: {str(error) or 'a value is wrong'}; {name} is {_signature(kind)}") from error


def named(key: str, name: Any, table: Mapping[str, type]) -> type:
    """The class of a name in the table, or of a dotted path. Raises InputError, with the config key, for another name,
    or one in ``NOT_TRAINED``."""
    if isinstance(name, (list, dict)):
        raise InputError(f"{key}: name takes the name of one class, got {name!r}")
    if name in NOT_TRAINED:
        raise InputError(f"{key}: {name} cannot be trained with: {NOT_TRAINED[name]}")
    if isinstance(name, str) and "." in name:
        return _imported(key, name)
    if name not in table:
        raise InputError(f"{key}: there is no {name!r}; did you mean {nearest(name, table)!r}?")
    return table[name]


def _imported(key: str, name: str) -> type:
    """The class of a dotted path, ``package.module.Class``: the loss or the miner of a user."""
    module, _, last = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{key}: cannot import {name!r}: {error}; install the package that holds it") from error
    if not (inspect.isclass(kind) and issubclass(kind, ModuleWithRecords)):
        raise InputError(f"{key}: {name!r} is no loss, miner, reducer or distance of pytorch-metric-learning")
    return kind


def _objects(key: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "name" in value:
        return build(key, value, {name: kind for table in TABLES.values() for name, kind in table.items()})
    return {name: _objects(f"{key}.{name}", part) for name, part in value.items()}


class PerFeature(nn.ModuleList):
    """One loss for each feature of a network with several features, for losses that have weights or a memory."""


def build_miner(key: str, section: Mapping[str, Any]) -> Any:
    """Builds the miner of a config's section; None if it has no miner. Raises InputError as ``build``."""
    return build(f"{key}.miner", section["miner"], TABLES["miner"]) if section["miner"] else None


def cross_camera_pairs(pids: Tensor, camids: Tensor, mined: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """The pairs (a1, p, a2, n) or triplets (a, p, n) that a miner chose (None: all pairs of the batch) without those
    of one identity and one camera. All negatives stay. ``pids`` and ``camids`` have shape (N,), integer."""
    if mined is None:
        same = pids[:, None] == pids
        positive = same & (camids[:, None] != camids)
        return (*positive.nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))
    a, p, *negatives = mined
    kept = camids[a] != camids[p]
    return (a[kept], p[kept], *(negatives if len(mined) == 4 else [negatives[0][kept]]))


def check_criterion(criterion: Any, optimizer: Optimizer, miner: nn.Module | None, cross_camera: bool) -> None:
    """Refuses a criterion, or a loss inside it, that an engine could not train with, or whose weights the optimizer
    does not have. Raises InputError, naming the loss, the reason and the fix."""
    if not isinstance(criterion, nn.Module):
        raise InputError(f"criterion must be a loss of pytorch_metric_learning, got {criterion!r}")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(p.requires_grad and id(p) not in trained for p in criterion.parameters()):
        loss = criterion[0] if isinstance(criterion, PerFeature) else criterion
        made = "make the optimizer with build_optimizer(cfg, model, criterion)"
        added = "call optimizer.add_param_group({'params': criterion.parameters()})"
        untrained = f"{type(loss).__name__} has weights that the optimizer does not train"
        raise InputError(f"{untrained}; {made}, or {added}")
    if distributed.size() > 1 and _parts(criterion, pml_distributed.DistributedLossWrapper):
        twice = "DistributedLossWrapper gathers the batch of all processes, which the engine does itself"
        raise InputError(f"{twice}: give the engine the loss inside")
    if _parts(criterion, torchreid.losses.TripletLoss) and (miner is not None or cross_camera):
        raise InputError("torchreid's TripletLoss takes no pairs: give the engine neither miner nor cross_camera")
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
