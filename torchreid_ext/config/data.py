"""Builds the data manager that a configuration describes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torchreid

from pml_drsl.checks import InputError
from pml_drsl.machine import available_cores
from torchreid_ext.config.node import Config, check, picked
from torchreid_ext.data.datasets import register_datasets, without_empty_folders
from torchreid_ext.data.loading import rebuilt
from torchreid_ext.data.samplers import SAMPLERS
from torchreid_ext.data.splits import SetOptions, make_options, read
from torchreid_ext.data.validation import check_overlap, hold_out
from torchreid_ext.images import Row
from torchreid_ext.runtime import distributed, generators


def build_datamanager(cfg: Config) -> Any:
    """torchreid's data manager of ``data.type``, with the data sets of ``datasets`` registered. Raises InputError for
    an unknown data set, sampler or augmentation, missing data, a batch that cannot be filled, or images that are in two
    sources, or in training and in the test."""
    check(cfg)
    register_datasets(cfg.datasets)
    kind = torchreid.data.VideoDataManager if cfg.data.type == "video" else torchreid.data.ImageDataManager
    with input_errors(cfg):
        # VIPeR and others draw their splits when they are first read, and keep them in a file: the same for all runs.
        with generators.untouched(seed=0):
            manager = kind(**_arguments(cfg), train_sampler="SequentialSampler")
        if cfg.data.type == "video":
            _sort_frames(manager)
        _number_identities(manager)
        # torchreid loses this number when it joins several sources.
        manager.train_loader.dataset.k_tfm = cfg.data.k_tfm
        if cfg.data.identities or cfg.data.validation:
            hold_out(manager, cfg.data.identities, cfg.data.validation, cfg.data.validation_seed, _in_test_batch(cfg))
        loader = manager.train_loader
        manager.train_loader = rebuilt(loader, loader.dataset, sampler=_sampler(cfg, loader.dataset.train))
    if not cfg.data.allow_overlap:
        check_overlap(manager, tested=not cfg.data.combineall)
    return manager


def _sort_frames(manager: Any) -> None:
    """Sorts the frames of PRID2011 and iLIDS-VID, which torchreid lists in the order of the file system."""
    loaders = [(manager.sources, manager.train_loader)]
    loaders += [([name], loader) for name, splits in manager.test_loader.items() for loader in splits.values()]
    for names, loader in loaders:
        unsorted = [number for number, name in enumerate(names) if name in ("prid2011", "ilidsvid")]
        for items in (loader.dataset.train, loader.dataset.query, loader.dataset.gallery) if unsorted else ():
            items[:] = [(tuple(sorted(item[0])), *item[1:]) if item[3] in unsorted else item for item in items]


def _number_identities(manager: Any) -> None:
    """Numbers the identities of CUHK02 and CUHK-SYSU by their first images. torchreid numbers a set of names, whose
    order differs from process to process, so that a run could not be resumed, nor have several processes."""
    train = manager.train_loader.dataset.train
    for source in (number for number, name in enumerate(manager.sources) if name in ("cuhk02", "cuhksysu")):
        pids = list(dict.fromkeys(item[1] for item in sorted(train) if item[3] == source))
        numbers = dict(zip(pids, sorted(pids), strict=True))
        train[:] = [(item[0], numbers.get(item[1], item[1]), *item[2:]) for item in train]


def _in_test_batch(cfg: Config) -> int:
    """How many images or tracklets a test reads at once: of whole tracklets, which may have a thousand frames, one, as
    torchreid asks for."""
    return 1 if cfg.data.type == "video" and cfg.video.sample_method == "all" else cfg.test.batch_size


def _own_sets(cfg: Config, names: Sequence[str]) -> dict[str, SetOptions]:
    return {name: make_options(name, cfg.datasets[name]) for name in dict.fromkeys(names) if name in cfg.datasets}


def own_images(cfg: Config, names: Sequence[str]) -> dict[str, tuple[str, Row]]:
    """The images of those of the named data sets that the configuration describes, by their paths: the data set, and
    the image with its names of identity and camera, in whose place a data manager has numbers. There are none of
    tracklets, as ``check`` says."""
    tables = {name: read(name, options, cfg.data.root) for name, options in _own_sets(cfg, names).items()}
    return {row.path: (name, row) for name, table in tables.items() for row in table.rows}


def person(owner: str, image: Row) -> str:
    """The name of a person among all data sets: one name in two of them is two people."""
    return f"{owner}/{image.identity}"


def check_save_dir(cfg: Config) -> None:
    """Raises InputError if a data set would take the pictures that the run writes for photos."""
    folder = Path(cfg.data.save_dir).resolve()
    for name, options in _own_sets(cfg, [*cfg.data.sources, *cfg.data.targets]).items():
        for part in options.folder if options.csv is None else ():
            photos = Path(cfg.data.root, part).expanduser().resolve()
            pictures = [folder / name for name in _PICTURES if folder.is_relative_to(photos)]
            if any(options.takes(picture.relative_to(photos).as_posix()) for picture in pictures):
                where = f"data.save_dir {cfg.data.save_dir!r} lies in a folder of datasets.{name}"
                cure = "move it, or give a folder elsewhere, such as data.save_dir ../log"
                raise InputError(f"{where}, so that the run's own pictures would be taken for photos: {cure}")


# of a run, in data.save_dir
_PICTURES = ("batch.png", "ranking_mine.png", "untrained/ranking_mine.png", "test/ranking_mine.png")
_GROUPS = ("num_instances", "num_cams", "num_datasets")
# torchreid's samplers of equal shares: the key, where an item says to what it belongs, and the name of that.
_SHARES = {"RandomDomainSampler": ("num_cams", 2, "cameras"), "RandomDatasetSampler": ("num_datasets", 3, "data sets")}


def _sampler(cfg: Config, items: list[Any]) -> Any:
    """A training sampler, of our own or of torchreid, for items (path, pid, camid, dsetid). Raises InputError if it
    cannot fill a batch."""
    name, batch_size = cfg.sampler.train_sampler, cfg.train.batch_size
    if name in SAMPLERS:
        return SAMPLERS[name]([item[1] for item in items], batch_size, cfg.sampler.num_instances)
    if name in _SHARES:
        # torchreid says nothing of use, and notices a small camera or data set only when it draws it, perhaps late.
        key, place, groups = _SHARES[name]
        sizes = Counter(item[place] for item in items)
        number = cfg.sampler[key] if cfg.sampler[key] > 0 else len(sizes)
        if batch_size % number or number > len(sizes) or min(sizes.values()) < batch_size // number:
            wanted = f"sampler.{key} {cfg.sampler[key]} takes {number} {groups} in equal shares of train.batch_size"
            there = f"the sources have {len(sizes)}, the smallest with {min(sizes.values())} training images"
            raise InputError(f"{name} cannot fill a batch: {wanted} {batch_size}, and {there}; change one of the two")
    options = picked(cfg.sampler, *_GROUPS)
    return torchreid.data.sampler.build_train_sampler(items, name, batch_size=batch_size, **options)


def _arguments(cfg: Config) -> dict[str, Any]:
    """The arguments of a data manager, except the training sampler."""
    names = ("root", "sources", "height", "width", "transforms", "norm_mean", "norm_std", "split_id", "combineall")
    arguments = picked(cfg.data, *names) | picked(cfg.sampler, *_GROUPS)
    if cfg.data.type == "video":
        arguments |= picked(cfg.video, "seq_len", "sample_method")
    else:
        arguments |= picked(cfg.data, "k_tfm", "load_train_targets") | picked(cfg.sampler, "train_sampler_t")
        arguments |= image_options(cfg)
    # With validation identities, the targets are not tested on, and need not be there.
    targets = [] if cfg.data.validation and not cfg.data.load_train_targets else cfg.data.targets
    arguments |= {"targets": targets, "use_gpu": cfg.use_gpu, "workers": _workers(cfg.data.workers)}
    return arguments | {"batch_size_train": cfg.train.batch_size, "batch_size_test": _in_test_batch(cfg)}


def image_options(cfg: Config) -> dict[str, Any]:
    """What says which images a data set of torchreid has, beside its name."""
    options = picked(cfg.data, "root", "split_id") | {"market1501_500k": cfg.market1501.use_500k_distractors}
    return options | {"cuhk03_labeled": cfg.cuhk03.labeled_images, "cuhk03_classic_split": cfg.cuhk03.classic_split}


@contextlib.contextmanager
def input_errors(cfg: Config) -> Iterator[None]:
    """Turns the errors that torchreid raises for wrong values or missing data into ``InputError``, and removes
    the empty folders of a download that failed."""
    try:
        with without_empty_folders(Path(cfg.data.root)):
            yield
    except InputError:
        raise
    except (AssertionError, ValueError) as error:
        # torchreid's data managers raise them for an unknown data set or split; its samplers, for the targets' training
        # images, say little or nothing.
        given = f"data.sources {cfg.data.sources}, data.targets {cfg.data.targets}"
        if cfg.data.load_train_targets:
            given += f", data.load_train_targets True with sampler.train_sampler_t {cfg.sampler.train_sampler_t}"
            given += f" and train.batch_size {cfg.train.batch_size}"
        raise InputError(f"{str(error) or 'an assertion of torchreid failed'}: {given}") from error
    except (OSError, RuntimeError) as error:
        sets = " ".join(dict.fromkeys(cfg.data.sources + cfg.data.targets))
        unread = f"{sets} below data.root {cfg.data.root!r}: {error}"
        raise InputError(f"cannot read {unread}. Put the data there, or say with --root where it is") from error


def _workers(wanted: int) -> int:
    """At most one loading process for each core, which a machine's training processes share; -1: one for each."""
    cores = max(1, available_cores() // distributed.on_this_machine())
    if wanted > cores:
        of_each = " for each training process" if distributed.on_this_machine() > 1 else ""
        print(f"data.workers {wanted}: there are {cores} cores{of_each}, so {cores} processes load data")
    return cores if wanted == -1 else min(wanted, cores)
