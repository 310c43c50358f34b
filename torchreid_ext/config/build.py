"""Builds the network, the loss, the optimizer, the scheduler and the engine that a configuration describes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torchreid
from torch import nn
from torch.optim import Optimizer

from pml_drsl.checks import InputError
from pml_drsl.wrappers import CrossBatchMemory
from torchreid_ext import networks
from torchreid_ext.config.keys import DRSL_ARGUMENTS
from torchreid_ext.config.node import Config, check, picked
from torchreid_ext.data.samplers import steps_per_epoch
from torchreid_ext.engine import criteria
from torchreid_ext.engine.engines import ENGINES, ImagePMLEngine
from torchreid_ext.engine.epoch import Layers
from torchreid_ext.runtime import distributed


def build_model(cfg: Config, num_classes: int) -> nn.Module:
    """The network, which returns in training what the loss needs; with ``use_gpu`` on the GPU, if there is one. Raises
    InputError for an unknown network, a network that cannot have ``model.bnneck`` or ``model.last_stride``, ImageNet
    weights that cannot be downloaded, or ``train.sync_batchnorm`` on the CPU."""
    use_gpu = cfg.use_gpu and torch.cuda.is_available()
    model = _from_the_zoo(cfg, num_classes, use_gpu)
    if cfg.model.last_stride == 1:
        networks.set_last_stride(model, cfg.model.name)
    if cfg.model.bnneck:
        networks.add_neck(model)
    if cfg.train.sync_batchnorm and distributed.size() > 1:
        if not use_gpu:
            raise InputError("train.sync_batchnorm: torch has it only on GPUs; train on GPUs, or set it to False")
        model = networks.with_sync_batchnorm(model)
    if use_gpu:
        model = model.to("cuda")
        number = torch.cuda.device_count()
        if number > 1 and not distributed.launched():
            # nn.DataParallel would change the recipe: batch normalisation would see a share of each batch.
            start = "torchrun --standalone --nproc_per_node gpu -m torchreid_ext"
            print(f"This process uses 1 of {number} GPUs; for all, start it with {start}")
    return model


def _from_the_zoo(cfg: Config, num_classes: int, use_gpu: bool) -> nn.Module:
    name, build = cfg.model.name, torchreid.models.build_model
    networks.check_known(name)
    options = {"name": name, "num_classes": num_classes, "loss": "softmax" if cfg.loss.name == "softmax" else "triplet"}
    if name.startswith(networks.TIMM):
        build = networks.TimmNetwork
        options |= {"name": name.removeprefix(networks.TIMM), **picked(cfg.data, "height", "width")}
    else:
        options["use_gpu"] = use_gpu
    # The weights of model.load_weights take the place of ImageNet's, which need not be downloaded then.
    pretrained = cfg.model.pretrained and not cfg.model.load_weights
    try:
        return build(**options, pretrained=pretrained)
    except Exception as error:
        if isinstance(error, InputError) or not pretrained:
            raise
        # torchreid's downloads raise errors of many kinds. An error of the network itself comes again without weights.
        build(**options, pretrained=False)
        cure = "Connect to the network, or give a file of weights with model.load_weights FILE"
        worse = "To train from random weights, which takes longer, set model.pretrained False"
        raise InputError(f"cannot get the ImageNet weights of {name}: {error}. {cure}. {worse}") from error


def check_takes(cfg: Config, model: nn.Module) -> None:
    """Raises InputError for a network that cannot take as small or as few images as it will get: in training as many as
    are in the smallest chunk, of which two are tried, because batch normalisation needs two values."""
    in_batch = cfg.train.batch_size // distributed.size() * (cfg.video.seq_len if cfg.data.type == "video" else 1)
    in_batch *= cfg.data.k_tfm
    smallest = in_batch // -(-in_batch // (cfg.train.chunk_size or in_batch))
    trains, number = not cfg.test.evaluate, 1 if cfg.test.evaluate else min(smallest, 2)
    try:
        networks.on_black_images(model, cfg.data.height, cfg.data.width, trains, trains, number)
    except (ValueError, RuntimeError, AssertionError) as error:
        images = f"{number} {'image' if number == 1 else 'images'} of {cfg.data.height} x {cfg.data.width} pixels"
        why = str(error) or "its layers need another size"
        larger = "larger images (data.height, data.width), or more at a time (train.batch_size, train.chunk_size)"
        raise InputError(f"{cfg.model.name} cannot take {images}: {why}. Give {larger}") from error


def build_criterion(cfg: Config, model: nn.Module, num_classes: int, steps: int | None = None) -> nn.Module | None:
    """The metric loss of ``loss.drsl`` or ``loss.pml``, with its distance, reducer and memory, on the model's device;
    torchreid's triplet loss, or None for cross-entropy alone.

    Give the loss to ``build_optimizer`` and to ``build_engine``, because it may have weights. ``steps`` is the number
    in an epoch, ``samplers.steps_per_epoch(datamanager)``, for a cross-batch memory that does not start at once. Raises
    InputError for a value that is not allowed, an unknown class or argument, or a combination that cannot be trained.
    """
    check(cfg)
    name, key, section = cfg.loss.name, f"loss.{cfg.loss.name}", cfg.loss[cfg.loss.name]
    if name == "drsl":
        of_loss, described = key, {"name": "DRSLoss", **picked(section, *DRSL_ARGUMENTS), "collect_stats": True}
    elif name == "pml":
        of_loss, described = f"{key}.loss", {"name": section.loss, **section.kwargs}
    elif cfg.loss.cross_camera:
        raise InputError(f"loss.cross_camera is for loss.name drsl and pml, got {name!r}; set it to False")
    else:
        return torchreid.losses.TripletLoss(section.margin) if name == "triplet" else None
    losses: list[nn.Module] = []
    tables = criteria.TABLES
    for size in networks.feature_sizes(model, cfg.data.height, cfg.data.width):
        # Each loss gets a distance and a reducer of its own, which keep statistics.
        given = [part for part in ("distance", "reducer") if section[part]]
        parts = {part: criteria.build(f"{key}.{part}", section[part], tables[part]) for part in given}
        # P2SGradLoss calls its embedding size descriptors_dim.
        from_the_data = {"num_classes": num_classes, "embedding_size": size, "descriptors_dim": size}
        loss = criteria.build(of_loss, parts | described, tables["loss"], from_the_data)
        losses.append(_with_memory(cfg, loss, size, steps) if section.memory_size else loss)
    has_state = section.memory_size or next(losses[0].parameters(), None) is not None
    criterion = criteria.PerFeature(losses) if has_state and len(losses) > 1 else losses[0]
    return criterion.to(next(model.parameters()).device)


def _with_memory(cfg: Config, loss: nn.Module, size: int, steps: int | None) -> nn.Module:
    """The loss with a memory of features of this size, which starts after some epochs of so many steps."""
    name, key, section = type(loss).__name__, f"loss.{cfg.loss.name}", cfg.loss[cfg.loss.name]
    supported = CrossBatchMemory.supported_losses()
    if name not in supported:
        refused = f"{key}.memory_size is {section.memory_size}, but {name} does not support a memory"
        raise InputError(f"{refused}; set it to 0, or take one of {', '.join(supported)}")
    start = section.memory_start_epoch if section.memory_start_epoch >= 0 else max(1, cfg.train.warmup_epoch)
    if start and steps is None:
        needed = f"the number of steps in an epoch is needed to start the memory after {start} epochs"
        cure = "give it to build_criterion, or start the memory at once with memory_start_epoch 0"
        raise InputError(f"{key}.memory_start_epoch: {needed}; {cure}")
    if start and start >= cfg.train.max_epoch and distributed.is_first():
        late = f"would start after {start} epochs, and train.max_epoch is {cfg.train.max_epoch}"
        cure = f"it is never used; set {key}.memory_start_epoch"
        warnings.warn(f"the cross-batch memory {late}: {cure}", stacklevel=3)
    miner = criteria.build_miner(key, section)
    return CrossBatchMemory(loss, size, section.memory_size, miner, warmup=start * (steps or 0))


def build_optimizer(cfg: Config, model: nn.Module, criterion: nn.Module | None = None) -> Optimizer:
    """torchreid's optimizer of the model and of the criterion, whose weights have the learning rate ``loss.pml.lr``.
    Raises InputError for an unknown optimizer, or a value that the optimizer refuses."""
    if cfg.train.staged_lr:
        Layers(model).check(cfg.train.new_layers, "train.new_layers")
    options = picked(cfg.train, "optim", "lr", "weight_decay", "staged_lr", "new_layers", "base_lr_mult")
    options |= {"momentum": cfg.sgd.momentum, "sgd_dampening": cfg.sgd.dampening, "sgd_nesterov": cfg.sgd.nesterov}
    options |= {"rmsprop_alpha": cfg.rmsprop.alpha, "adam_beta1": cfg.adam.beta1, "adam_beta2": cfg.adam.beta2}
    try:
        optimizer = torchreid.optim.build_optimizer(model, **options)
    except ValueError as error:
        raise InputError(f"train.optim {cfg.train.optim!r}: {error}") from error
    weights = [] if criterion is None else list(criterion.parameters())
    if weights:
        optimizer.add_param_group({"params": weights, "lr": cfg.loss.pml.lr or cfg.train.lr})
        # The weights of the criterion come first, because torchreid logs the learning rate of the last group.
        optimizer.param_groups.insert(0, optimizer.param_groups.pop())
    return optimizer


def build_scheduler(cfg: Config, optimizer: Optimizer) -> Any:
    """torchreid's scheduler; None for a constant learning rate. In the first N epochs, ``train.warmup_epoch``, the rate
    is also multiplied by 1/N, 2/N, ..., 1."""
    schedulers, epochs = [], cfg.train.warmup_epoch
    if cfg.train.lr_scheduler != "none":
        options = picked(cfg.train, "lr_scheduler", "stepsize", "gamma", "max_epoch")
        schedulers.append(torchreid.optim.build_lr_scheduler(optimizer, **options))
    if epochs < 2:
        return schedulers[0] if schedulers else None
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / epochs, total_iters=epochs - 1)
    return torch.optim.lr_scheduler.ChainedScheduler([warmup, *schedulers], optimizer)


def build_engine(
    cfg: Config, datamanager: Any, model: nn.Module, optimizer: Optimizer, scheduler: Any,
    criterion: nn.Module | None = None,
) -> ImagePMLEngine:  # fmt: skip
    """The engine of ``data.type`` and ``loss.name``; a ``criterion`` of None is built here. Raises InputError for a
    value that is not allowed, or values that exclude each other."""
    check(cfg)
    loss, section = cfg.loss.name, cfg.loss[cfg.loss.name]
    if loss == "triplet" and section.weight_t == section.weight_x == 0:
        raise InputError("loss.triplet.weight_t and loss.triplet.weight_x are both 0; raise one of them")
    if cfg.loss.cross_camera:
        seen = {item[1:3] for item in getattr(datamanager.train_loader.dataset, "train", [])}
        if seen and len(seen) == len({pid for pid, _ in seen}):
            alone = "every training identity has one camera, so that no positive is left"
            raise InputError(f"loss.cross_camera True: {alone}; set it to False")
    if criterion is None:
        criterion = build_criterion(cfg, model, datamanager.num_train_pids, steps_per_epoch(datamanager))
    arguments: dict[str, Any] = {"weight_m": 0, "weight_x": 1}
    if loss != "softmax":
        arguments = {"weight_m": section["weight_t" if loss == "triplet" else "weight_m"], "weight_x": section.weight_x}
    if loss in ("drsl", "pml") and not section.memory_size:  # A memory has the miner, which ranks its features too.
        arguments["miner"] = criteria.build_miner(f"loss.{loss}", section)
    if cfg.data.type == "video":
        arguments["pooling_method"] = cfg.video.pooling_method
    arguments |= {"criterion": criterion, "cross_camera": cfg.loss.cross_camera}
    arguments |= {"use_gpu": cfg.use_gpu, "label_smooth": cfg.loss.softmax.label_smooth}
    kind = ENGINES[cfg.data.type][loss == "drsl"]
    return kind(datamanager, model, optimizer=optimizer, scheduler=scheduler, **arguments)
