"""Builds the data manager that a configuration describes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torchreid

from pml_drsl.checks import InputError
from pml_drsl.machine import available_cores
from torchreid_ext.config.checks import check, choose
from torchreid_ext.config.node import Config
from torchreid_ext.data.datasets import register_datasets, without_empty_folders
from torchreid_ext.data.loading import rebuilt
from torchreid_ext.data.samplers import SAMPLERS
from torchreid_ext.data.validation import check_overlap, check_shares, hold_out
from torchreid_ext.runtime import distributed


def build_datamanager(cfg: Config) -> Any:
    """torchreid's data manager of ``data.type``, with the data sets of ``datasets`` registered.

    Raises:
        InputError: for an unknown data set, sampler or augmentation, missing data, a batch that cannot be filled, or
            images that are in two sources, or in training and in the test.
    """
    check(cfg)
    register_datasets(cfg.datasets)
    samplers = dict.fromkeys([*SAMPLERS, *torchreid.data.sampler.AVAI_SAMPLERS])
    sampler = choose("sampler.train_sampler", cfg.sampler.train_sampler, samplers)
    managers = {"image": torchreid.data.ImageDataManager, "video": torchreid.data.VideoDataManager}
    data_type = choose("data.type", cfg.data.type, managers)
    if data_type == "video" and cfg.data.k_tfm > 1:
        raise InputError(
            f"data.k_tfm must be 1 for video, whose tracklets have several frames already; got {cfg.data.k_tfm}"
        )
    check_shares(data_type, cfg.data.identities, cfg.data.validation)
    reduced = bool(cfg.data.identities or cfg.data.validation)
    with _input_errors(cfg), without_empty_folders(Path(cfg.data.root)):
        manager = managers[data_type](
            **_arguments(cfg, data_type),
            # A sampler of our own, or of fewer images, replaces this one below.
            train_sampler="SequentialSampler" if reduced or sampler in SAMPLERS else sampler,
        )
        # torchreid loses this number when it joins several sources.
        manager.train_loader.dataset.k_tfm = cfg.data.k_tfm
        if reduced:
            hold_out(manager, cfg.data.identities, cfg.data.validation, cfg.data.validation_seed, cfg.test.batch_size)
        if reduced or sampler in SAMPLERS:
            loader = manager.train_loader
            drawn = _sampler(cfg, sampler, loader.dataset.train)
            manager.train_loader = rebuilt(loader, loader.dataset, sampler=drawn)
    if not cfg.data.allow_overlap:
        check_overlap(manager, tested=not cfg.data.combineall)
    return manager


def _sampler(cfg: Config, name: str, items: list[Any]) -> Any:
    """A training sampler, of our own or of torchreid, for items whose second entry is the identity."""
    if name in SAMPLERS:
        return SAMPLERS[name]([item[1] for item in items], cfg.train.batch_size, cfg.sampler.num_instances)
    options = {key: cfg.sampler[key] for key in ("num_instances", "num_cams", "num_datasets")}
    return torchreid.data.sampler.build_train_sampler(items, name, batch_size=cfg.train.batch_size, **options)


def _arguments(cfg: Config, data_type: str) -> dict[str, Any]:
    """The arguments of a data manager, except the training sampler."""
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
    return {
        "root": cfg.data.root,
        "sources": cfg.data.sources,
        # With validation identities, the targets are not tested on, and need not be there.
        "targets": [] if cfg.data.validation and not cfg.data.load_train_targets else cfg.data.targets,
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
        **by_type[data_type],
    }


@contextlib.contextmanager
def _input_errors(cfg: Config) -> Iterator[None]:
    """Turns the errors that torchreid raises for wrong values or missing data into ``InputError``."""
    try:
        yield
    except AssertionError as error:
        # torchreid's samplers and data sets check their arguments with assertions that have no message.
        raise InputError(
            f"{str(error) or 'the sampler cannot fill a batch'}: train.batch_size {cfg.train.batch_size}, "
            f"sampler.train_sampler {cfg.sampler.train_sampler!r}, sampler.num_instances {cfg.sampler.num_instances}, "
            f"sampler.num_cams {cfg.sampler.num_cams}, sampler.num_datasets {cfg.sampler.num_datasets}. A batch needs "
            f"batch_size / num_instances identities that the sources have, and equal shares for cameras or data sets"
        ) from error
    except InputError:
        raise
    except ValueError as error:
        # torchreid's data managers raise it for an unknown data set or split.
        raise InputError(f"{error}: data.sources {cfg.data.sources}, data.targets {cfg.data.targets}") from error
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot read {' '.join(cfg.data.sources + cfg.data.targets)} below data.root {cfg.data.root!r}: {error}. "
            f"Put the data there, or say with --root where it is"
        ) from error


def _workers(wanted: int) -> int:
    """The number of loading processes: ``wanted``, but at most one for each core of this process; -1 is one for each.

    The training processes of a machine share its cores.
    """
    cores = max(1, available_cores() // distributed.on_this_machine())
    if wanted > cores:
        of_each = " for each training process" if distributed.on_this_machine() > 1 else ""
        print(f"data.workers {wanted}: there are {cores} cores{of_each}, so {cores} processes load data")
    return cores if wanted == -1 else min(wanted, cores)
