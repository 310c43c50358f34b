"""torchreid's configuration and ours; one function for each object it describes."""

from __future__ import annotations

import contextlib
import copy
import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torchreid
import yaml
from torch import nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from pml_drsl.losses import DRSLoss
from torchreid_ext import engines
from torchreid_ext.datasets import register_datasets
from torchreid_ext.keys import KEYS
from torchreid_ext.reading import rebuilt
from torchreid_ext.samplers import SAMPLERS


class Config(CfgNode):
    """A yacs node whose unknown keys are answered with the nearest known one.

    A YAML file may name another with ``base: FILE`` (relative to itself), whose values it then overrides.
    Keys below ``datasets`` are free.
    """

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        """Raises ValueError for a file that is missing, is no YAML mapping, or has an unknown key or wrong type."""
        self._merge(_read_yaml(Path(cfg_filename)), str(cfg_filename))

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Merges ``[key, value, key, value, ...]``, values as strings or objects; raises ValueError."""
        if len(cfg_list) % 2:
            raise ValueError(
                f"options come as KEY VALUE pairs, got {len(cfg_list)} words: {' '.join(map(str, cfg_list))}"
            )
        for key, value in zip(cfg_list[::2], cfg_list[1::2], strict=True):
            self._merge(_nested(key, self._decode_cfg_value(value)), "the command line")

    def _merge(self, values: Mapping[str, Any], source: str) -> None:
        known = dict(_flatten(self))
        for key, value in _flatten(values):
            _set(self, key, _coerce(key, value, known, source))


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold keys and values, got {values!r}")
    base = values.pop("base", None)
    return _override(_read_yaml(path.parent / base), values) if base else values


def _override(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        base[key] = _override(base[key], value) if both else value
    return base


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted key and value; a data set of one's own is one value, ``datasets.NAME``."""
    for key, value in values.items():
        if isinstance(value, Mapping) and prefix != "datasets.":
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, *rest = key.split(".", 1)
    return {first: _nested(rest[0], value) if rest else value}


def _set(node: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, Config())
    node[last] = copy.deepcopy(value)


def _coerce(key: str, value: Any, known: dict[str, Any], source: str) -> Any:
    if key.startswith("datasets."):
        if not isinstance(value, Mapping):
            raise ValueError(f"config key {key!r} takes the options of a data set, got {value!r} in {source}")
        return Config({**known.get(key, {}), **value})
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)
        raise ValueError(f"unknown config key {key!r} in {source}; did you mean {nearest[0]!r}?")
    default = known[key]
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, list):
        return list(value) if isinstance(value, (list, tuple)) else [value]
    if value is False and KEYS[key][0] == "off":
        # What YAML makes of the word.
        return "off"
    if type(value) is not type(default):
        raise ValueError(
            f"config key {key!r} takes a {type(default).__name__} such as {default!r}, got {value!r} in {source}"
        )
    return value


def get_default_config() -> Config:
    """Every key of torchreid's ``default_config.py`` with its default, and ours (``torchreid_ext.keys``)."""
    cfg = Config()
    for key, (default, _) in KEYS.items():
        _set(cfg, key, Config() if default == {} else default)
    return cfg


def plain(value: Any) -> Any:
    """A configuration, or a part of one, in dictionaries and lists, as YAML and checkpoints hold it."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def flat(cfg: Config) -> dict[str, Any]:
    """A configuration as dotted keys and plain values."""
    return {key: plain(value) for key, value in _flatten(cfg)}


def check(cfg: Config) -> None:
    """Raises ValueError for values that exclude each other, or that nothing can be done with."""
    if cfg.loss.name == "triplet" and cfg.loss.triplet.weight_x == 0 and cfg.train.fixbase_epoch > 0:
        raise ValueError("train.fixbase_epoch trains the classifier alone, which loss.triplet.weight_x 0 leaves out")
    if cfg.train.accumulate != 1:
        raise ValueError(
            f"train.accumulate {cfg.train.accumulate}: gradients are not accumulated over batches, because each image "
            f"is ranked among those of its own batch, and several small rankings are not one large one. Rank among "
            f"the images of earlier batches too with cross-batch memory, memory_size of the loss"
        )


def build_datamanager(cfg: Config) -> Any:
    """torchreid's data manager of ``data.type``, with the data sets of ``datasets`` registered.

    Raises:
        ValueError: for an unknown data set or sampler, missing data, or a batch that cannot be filled.
    """
    register_datasets(cfg.datasets)
    sampler = _choose(
        "sampler.train_sampler", cfg.sampler.train_sampler, [*SAMPLERS, *torchreid.data.sampler.AVAI_SAMPLERS]
    )
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
    data_type = _choose("data.type", cfg.data.type, managers)
    try:
        with _without_empty_folders(Path(cfg.data.root)):
            manager = managers[data_type](**common, **by_type[data_type])
    except AssertionError as error:
        # The host's samplers and data sets check their arguments with bare assertions.
        raise ValueError(
            f"{str(error) or 'the sampler cannot fill a batch'}: train.batch_size {cfg.train.batch_size}, "
            f"sampler.train_sampler {cfg.sampler.train_sampler!r}, sampler.num_instances {cfg.sampler.num_instances}, "
            f"sampler.num_cams {cfg.sampler.num_cams}, sampler.num_datasets {cfg.sampler.num_datasets}. A batch needs "
            f"batch_size / num_instances identities that the sources have, and equal shares for cameras or data sets"
        ) from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"cannot read {' '.join(cfg.data.sources + cfg.data.targets)} below data.root {cfg.data.root!r}: {error}. "
            f"Put the data there, or say with --root where it is"
        ) from error
    if sampler in SAMPLERS:
        loader = manager.train_loader
        pids = [items[1] for items in loader.dataset.train]
        drawn = SAMPLERS[sampler](pids, cfg.train.batch_size, cfg.sampler.num_instances)
        manager.train_loader = rebuilt(loader, loader.dataset, sampler=drawn)
    return manager


def _workers(wanted: int) -> int:
    """The number of loading processes: ``wanted``, or one for each core where those are fewer or -1 is wanted."""
    if wanted < -1:
        raise ValueError(f"data.workers must be 0 or more, or -1 for one on each core, got {wanted}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted > cores:
        print(f"data.workers {wanted}: there are {cores} cores, so {cores} processes load data")
    return cores if wanted == -1 else min(wanted, cores)


@contextlib.contextmanager
def _without_empty_folders(root: Path) -> Iterator[None]:
    # torchreid makes the folder of a data set before it tries to download it, and leaves it there.
    root_was_there = root.is_dir()
    there = set(root.glob("*"))
    try:
        yield
    except BaseException:
        for folder in [*set(root.glob("*")) - there, *([] if root_was_there else [root])]:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def build_model(cfg: Config, num_classes: int) -> nn.Module:
    """The network, built to return what the loss needs, on the GPUs there are if ``use_gpu``."""
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
        raise ValueError(f"model.name: {error.args[0]}") from error
    if use_gpu:
        model = model.to("cuda")
        if torch.cuda.device_count() > 1:
            model = nn.DataParallel(model)
    return model


def build_optimizer(cfg: Config, model: nn.Module) -> Optimizer:
    """torchreid's optimizer."""
    return torchreid.optim.build_optimizer(
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


def build_scheduler(cfg: Config, optimizer: Optimizer) -> Any:
    """torchreid's scheduler, or None."""
    if cfg.train.lr_scheduler == "none":
        return None
    return torchreid.optim.build_lr_scheduler(
        optimizer,
        lr_scheduler=cfg.train.lr_scheduler,
        stepsize=cfg.train.stepsize,
        gamma=cfg.train.gamma,
        max_epoch=cfg.train.max_epoch,
    )


def build_engine(cfg: Config, datamanager: Any, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> Any:
    """The engine of ``data.type`` and ``loss.name``."""
    drsl, triplet = cfg.loss.drsl, cfg.loss.triplet
    table = {
        ("image", "softmax"): (engines.ImageSoftmaxEngine, {}),
        ("video", "softmax"): (engines.VideoSoftmaxEngine, {}),
        ("image", "triplet"): (engines.ImageTripletEngine, dict(triplet)),
        ("video", "triplet"): (engines.VideoTripletEngine, dict(triplet)),
        ("image", "drsl"): (engines.ImageDRSLEngine, _drsl_arguments(drsl)),
        ("video", "drsl"): (engines.VideoDRSLEngine, _drsl_arguments(drsl)),
    }
    data_type = _choose("data.type", cfg.data.type, ("image", "video"))
    loss = _choose("loss.name", cfg.loss.name, ("softmax", "triplet", "drsl"))
    engine, arguments = table[data_type, loss]
    if data_type == "video":
        arguments["pooling_method"] = _choose("video.pooling_method", cfg.video.pooling_method, ("avg", "max"))
    return engine(
        datamanager,
        model,
        optimizer=optimizer,
        scheduler=scheduler,
        use_gpu=cfg.use_gpu,
        label_smooth=cfg.loss.softmax.label_smooth,
        **arguments,
    )


def _drsl_arguments(drsl: Config) -> dict[str, Any]:
    criterion = DRSLoss(drsl.temperature, drsl.sort_weight, drsl.margin, collect_stats=True)
    return {"criterion": criterion, "weight_m": drsl.weight_m, "weight_x": drsl.weight_x}


def run_arguments(cfg: Config) -> dict[str, Any]:
    """The arguments of ``engine.run``."""
    return {
        "save_dir": cfg.data.save_dir,
        "max_epoch": cfg.train.max_epoch,
        "start_epoch": cfg.train.start_epoch,
        "fixbase_epoch": cfg.train.fixbase_epoch,
        "open_layers": cfg.train.open_layers,
        "start_eval": cfg.test.start_eval,
        "eval_freq": cfg.test.eval_freq,
        "test_only": cfg.test.evaluate,
        "print_freq": cfg.train.print_freq,
        "visrank": cfg.test.visrank,
        "picture": cfg.test.picture,
        "checkpoint_freq": cfg.train.checkpoint_freq,
        "keep_checkpoints": cfg.train.keep_checkpoints,
        "amp": cfg.train.amp,
        "compiled": cfg.train.compile,
        "skip_nonfinite": cfg.train.skip_nonfinite,
        **test_arguments(cfg),
    }


def test_arguments(cfg: Config) -> dict[str, Any]:
    """The arguments of every ``engine.test`` of a run."""
    return {
        "dist_metric": cfg.test.dist_metric,
        "normalize_feature": cfg.test.normalize_feature,
        "visrank_topk": cfg.test.visrank_topk,
        "use_metric_cuhk03": cfg.cuhk03.use_metric_cuhk03,
        "ranks": cfg.test.ranks,
        "rerank": cfg.test.rerank,
    }


def _choose(key: str, value: str, allowed: Any) -> str:
    if value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
    return value
