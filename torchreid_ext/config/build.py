"""From a configuration to the objects it describes, one function for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchreid
from torch import nn
from torch.optim import Optimizer

from pml_drsl.checks import InputError
from pml_drsl.machine import available_cores
from torchreid_ext.config.checks import check, choose
from torchreid_ext.config.keys import DRSL_ARGUMENTS
from torchreid_ext.config.node import Config, flat, get_default_config, plain
from torchreid_ext.config.options import run_options
from torchreid_ext.data.datasets import register_datasets, without_empty_folders
from torchreid_ext.data.loading import rebuilt
from torchreid_ext.data.samplers import SAMPLERS
from torchreid_ext.engine import criteria, native
from torchreid_ext.engine import pml as engines
from torchreid_ext.recipe import neck as network
from torchreid_ext.recipe.warmup import warmed_up
from torchreid_ext.runtime import distributed

__all__ = [
    "Config",
    "build_criterion",
    "build_datamanager",
    "build_engine",
    "build_model",
    "build_optimizer",
    "build_scheduler",
    "check",
    "flat",
    "get_default_config",
    "plain",
    "run_options",
]


def build_datamanager(cfg: Config) -> Any:
    """torchreid's data manager of ``data.type``, with the data sets of ``datasets`` registered.

    Raises:
        InputError: for an unknown data set, sampler or augmentation, missing data, or a batch that cannot be filled.
    """
    check(cfg)
    register_datasets(cfg.datasets)
    samplers = dict.fromkeys([*SAMPLERS, *torchreid.data.sampler.AVAI_SAMPLERS])
    sampler = choose("sampler.train_sampler", cfg.sampler.train_sampler, samplers)
    common = {
        "root": cfg.data.root,
        "sources": cfg.data.sources,
        "targets": cfg.data.targets,
        "height": cfg.data.height,
        "width": cfg.data.width,
        "transforms": cfg.data.transforms,
        "norm_mean": cfg.data.norm_mean,
        "norm_std": cfg.data.norm_std,
        "use_gpu": cfg.use_gpu,
        "split_id": cfg.data.split_id,
        "combineall": cfg.data.combineall,
        "batch_size_train": cfg.train.batch_size,
        "batch_size_test": cfg.test.batch_size,
        "workers": _workers(cfg.data.workers),
        "num_instances": cfg.sampler.num_instances,
        "num_cams": cfg.sampler.num_cams,
        "num_datasets": cfg.sampler.num_datasets,
        # One of our own takes the place of the host's: see below.
        "train_sampler": "SequentialSampler" if sampler in SAMPLERS else sampler,
    }
    by_type = {
        "image": {
            "k_tfm": cfg.data.k_tfm,
            "load_train_targets": cfg.data.load_train_targets,
            "train_sampler_t": cfg.sampler.train_sampler_t,
            "cuhk03_labeled": cfg.cuhk03.labeled_images,
            "cuhk03_classic_split": cfg.cuhk03.classic_split,
            "market1501_500k": cfg.market1501.use_500k_distractors,
        },
        "video": {"seq_len": cfg.video.seq_len, "sample_method": cfg.video.sample_method},
    }
    managers = {"image": torchreid.data.ImageDataManager, "video": torchreid.data.VideoDataManager}
    data_type = choose("data.type", cfg.data.type, managers)
    if cfg.data.k_tfm < 1 or (data_type == "video" and cfg.data.k_tfm > 1):
        raise InputError(
            f"data.k_tfm must be 1 or more, and 1 for video, whose tracklets have several frames already; "
            f"got {cfg.data.k_tfm}"
        )
    try:
        with without_empty_folders(Path(cfg.data.root)):
            manager = managers[data_type](**common, **by_type[data_type])
    except AssertionError as error:
        # The host's samplers and data sets check their arguments with bare assertions.
        raise InputError(
            f"{str(error) or 'the sampler cannot fill a batch'}: train.batch_size {cfg.train.batch_size}, "
            f"sampler.train_sampler {cfg.sampler.train_sampler!r}, sampler.num_instances {cfg.sampler.num_instances}, "
            f"sampler.num_cams {cfg.sampler.num_cams}, sampler.num_datasets {cfg.sampler.num_datasets}. A batch needs "
            f"batch_size / num_instances identities that the sources have, and equal shares for cameras or data sets"
        ) from error
    except InputError:
        raise
    except ValueError as error:
        # The host's data sets and samplers raise it for an unknown name or split.
        raise InputError(f"{error}: data.sources {cfg.data.sources}, data.targets {cfg.data.targets}") from error
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot read {' '.join(cfg.data.sources + cfg.data.targets)} below data.root {cfg.data.root!r}: {error}. "
            f"Put the data there, or say with --root where it is"
        ) from error
    # torchreid loses this number when it joins several sources.
    manager.train_loader.dataset.k_tfm = cfg.data.k_tfm
    if sampler in SAMPLERS:
        loader = manager.train_loader
        pids = [items[1] for items in loader.dataset.train]
        drawn = SAMPLERS[sampler](pids, cfg.train.batch_size, cfg.sampler.num_instances)
        manager.train_loader = rebuilt(loader, loader.dataset, sampler=drawn)
    return manager


def _workers(wanted: int) -> int:
    """The number of loading processes: ``wanted``, or one for each core of this process where those are fewer or -1 is
    wanted."""
    if wanted < -1:
        raise InputError(f"data.workers must be 0 or more, or -1 for one on each core, got {wanted}")
    cores = max(1, available_cores() // distributed.on_this_machine())
    if wanted > cores:
        of_each = " for each training process" if distributed.on_this_machine() > 1 else ""
        print(f"data.workers {wanted}: there are {cores} cores{of_each}, so {cores} processes load data")
    return cores if wanted == -1 else min(wanted, cores)


def build_model(cfg: Config, num_classes: int) -> nn.Module:
    """The network, built to return what the loss needs, on the GPUs there are if ``use_gpu``.

    Raises:
        InputError: for an unknown network, one that ``model.bnneck`` or ``model.last_stride`` is not for, ImageNet
            weights that cannot be had, or ``train.sync_batchnorm`` on the CPU.
    """
    use_gpu = cfg.use_gpu and torch.cuda.is_available()
    try:
        model = torchreid.models.build_model(
            name=cfg.model.name,
            num_classes=num_classes,
            loss="softmax" if cfg.loss.name == "softmax" else "triplet",
            pretrained=cfg.model.pretrained,
            use_gpu=use_gpu,
        )
    except KeyError as error:
        raise InputError(f"model.name: {error.args[0]}") from error
    except Exception as error:
        # The host downloads in several ways, each with failures of its own.
        if not cfg.model.pretrained:
            raise
        raise InputError(
            f"cannot get the ImageNet weights of {cfg.model.name}: {error}. Connect to the network, or train from "
            f"random weights with model.pretrained False"
        ) from error
    if choose("model.last_stride", cfg.model.last_stride, (1, 2)) == 1:
        network.set_last_stride(model, cfg.model.name)
    if cfg.model.bnneck:
        network.add_neck(model)
    if cfg.train.sync_batchnorm and distributed.size() > 1:
        if not use_gpu:
            raise InputError("train.sync_batchnorm: torch has it on GPUs alone; train on GPUs, or set it to False")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if use_gpu:
        model = model.to("cuda")
        if torch.cuda.device_count() > 1 and not distributed.launched():
            model = nn.DataParallel(model)
    return model


def build_criterion(cfg: Config, model: nn.Module, num_classes: int) -> nn.Module | None:
    """The metric loss of ``loss.drsl`` or ``loss.pml``, on the model's device; None for torchreid's own losses.

    A loss with weights is to be given to both ``build_optimizer`` and ``build_engine``.

    Raises:
        InputError: for an unknown class or argument, or a combination that cannot be trained.
    """
    described = {
        "drsl": {
            "name": "DRSLoss",
            **{entry.name: cfg.loss.drsl[entry.name] for entry in DRSL_ARGUMENTS.values()},
            "collect_stats": True,
        },
        "pml": {"name": cfg.loss.pml.loss, **cfg.loss.pml.kwargs},
    }
    name = cfg.loss.name
    if name not in described:
        if cfg.loss.cross_camera:
            raise InputError(f"loss.cross_camera is for loss.name drsl and pml, got {name!r}")
        return None
    sizes = network.feature_sizes(model, cfg.data.height, cfg.data.width)
    criterion = criteria.build_criterion(f"loss.{name}", cfg.loss[name], described[name], num_classes, sizes)
    return criterion.to(next(model.parameters()).device)


def build_optimizer(cfg: Config, model: nn.Module, criterion: nn.Module | None = None) -> Optimizer:
    """torchreid's optimizer; the weights of a criterion that has any learn at ``loss.pml.lr``.

    Raises:
        InputError: for an unknown optimizer, or a value that the optimizer refuses.
    """
    try:
        optimizer = torchreid.optim.build_optimizer(
            model,
            optim=cfg.train.optim,
            lr=cfg.train.lr,
            weight_decay=cfg.train.weight_decay,
            momentum=cfg.sgd.momentum,
            sgd_dampening=cfg.sgd.dampening,
            sgd_nesterov=cfg.sgd.nesterov,
            rmsprop_alpha=cfg.rmsprop.alpha,
            adam_beta1=cfg.adam.beta1,
            adam_beta2=cfg.adam.beta2,
            staged_lr=cfg.train.staged_lr,
            new_layers=cfg.train.new_layers,
            base_lr_mult=cfg.train.base_lr_mult,
        )
    except ValueError as error:
        raise InputError(f"train.optim {cfg.train.optim!r}: {error}") from error
    weights = [] if criterion is None else list(criterion.parameters())
    if weights:
        optimizer.add_param_group({"params": weights, "lr": cfg.loss.pml.lr or cfg.train.lr})
        # First, since torchreid logs the last group's learning rate as that of the network.
        optimizer.param_groups.insert(0, optimizer.param_groups.pop())
    return optimizer


def build_scheduler(cfg: Config, optimizer: Optimizer) -> Any:
    """torchreid's scheduler, or None; after a linear warm-up where there is ``train.warmup_epoch``.

    Raises:
        InputError: for an unknown scheduler, or a value that the scheduler refuses.
    """
    scheduler = None
    if cfg.train.lr_scheduler != "none":
        try:
            scheduler = torchreid.optim.build_lr_scheduler(
                optimizer,
                lr_scheduler=cfg.train.lr_scheduler,
                stepsize=cfg.train.stepsize,
                gamma=cfg.train.gamma,
                max_epoch=cfg.train.max_epoch,
            )
        except (ValueError, TypeError) as error:
            raise InputError(f"train.lr_scheduler {cfg.train.lr_scheduler!r}: {error}") from error
    return warmed_up(optimizer, scheduler, cfg.train.warmup_epoch)


def build_engine(
    cfg: Config,
    datamanager: Any,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    criterion: nn.Module | None = None,
) -> Any:
    """The engine of ``data.type`` and ``loss.name``.

    Args:
        criterion: from ``build_criterion``; made here where it is None.

    Raises:
        InputError: for an unknown value, or values that exclude each other.
    """
    table = {
        ("image", "softmax"): native.ImageSoftmaxEngine,
        ("video", "softmax"): native.VideoSoftmaxEngine,
        ("image", "triplet"): native.ImageTripletEngine,
        ("video", "triplet"): native.VideoTripletEngine,
        ("image", "drsl"): engines.ImageDRSLEngine,
        ("video", "drsl"): engines.VideoDRSLEngine,
        ("image", "pml"): engines.ImagePMLEngine,
        ("video", "pml"): engines.VideoPMLEngine,
    }
    data_type = choose("data.type", cfg.data.type, ("image", "video"))
    loss = choose("loss.name", cfg.loss.name, ("softmax", "triplet", "drsl", "pml"))
    if cfg.loss[loss].get("weight_x", 1) == 0 and cfg.train.fixbase_epoch > 0:
        raise InputError(f"train.fixbase_epoch trains the classifier alone, which loss.{loss}.weight_x 0 leaves out")
    if criterion is None:
        criterion = build_criterion(cfg, model, datamanager.num_train_pids)
    arguments = dict(cfg.loss.triplet) if loss == "triplet" else {}
    if criterion is not None:
        arguments = _metric_arguments(cfg, criterion)
    if data_type == "video":
        arguments["pooling_method"] = choose("video.pooling_method", cfg.video.pooling_method, ("avg", "max"))
    return table[data_type, loss](
        datamanager,
        model,
        optimizer=optimizer,
        scheduler=scheduler,
        use_gpu=cfg.use_gpu,
        label_smooth=cfg.loss.softmax.label_smooth,
        **arguments,
    )


def _metric_arguments(cfg: Config, criterion: nn.Module) -> dict[str, Any]:
    section = cfg.loss[cfg.loss.name]
    return {
        "criterion": criterion,
        "weight_m": section.weight_m,
        "weight_x": section.weight_x,
        # A memory has the miner, which ranks its features too.
        "miner": None if section.memory_size else criteria.build_miner(f"loss.{cfg.loss.name}", section),
        "cross_camera": cfg.loss.cross_camera,
    }
