"""Trains and tests as a configuration says, and keeps a log of it, or shows what would be trained on."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import torch
from torchvision.utils import save_image
from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.console import message, replacing
from pml_drsl.evaluation.scores import RetrievalResult
from pml_drsl.machine import available_cores
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.checkpoint.folder import History, alone, check_new
from torchreid_ext.config import build
from torchreid_ext.config.data import build_datamanager, check_save_dir, own_images, person
from torchreid_ext.config.keys import KEYS
from torchreid_ext.config.node import Config, check, flat, run_options
from torchreid_ext.config.values import dumped, plain
from torchreid_ext.data.loading import rebuilt
from torchreid_ext.data.samplers import steps_per_epoch
from torchreid_ext.evaluation import ranking
from torchreid_ext.pixels import read_image
from torchreid_ext.runtime import distributed, generators


def prepare(cfg: Config) -> Any:
    """Seeds the generators, and builds the engine of a configuration with all that it needs. Raises InputError for a
    value that cannot be used, missing data, or a test of people on whom ``model.load_weights`` was trained."""
    if cfg.test.evaluate and not (cfg.model.resume or cfg.model.load_weights):
        lacking = "test.evaluate True tests a trained network, and there is none"
        cure = "give its checkpoint with model.resume FILE or model.load_weights FILE"
        other = "To test a network before any training, set test.untrained True and train.max_epoch 0 instead"
        raise InputError(f"{lacking}: {cure}. {other}")
    check(cfg)
    generators.seed_everything(cfg.train.seed)
    if cfg.test.rerank and not cfg.test.evaluate:
        print("test.rerank: as in torchreid, a run that trains does not re-rank; test it alone with test.evaluate True")
    if cfg.use_gpu and torch.cuda.is_available() and cfg.data.type == "image":
        torch.backends.cudnn.benchmark = True  # As torchreid's own script does: all images have one size.
    start = cfg.clone()
    weights = cfg.model.load_weights or ("ImageNet's weights" if cfg.model.pretrained else "random weights")
    if _resumes(cfg):
        weights = "a checkpoint"
        # The checkpoint has every weight, so that others need not be there any more.
        start.model.pretrained, start.model.load_weights = False, ""
    with distributed.one_first():
        datamanager = build_datamanager(cfg)
        model = build.build_model(start, datamanager.num_train_pids)
    # No script changes the data set between epochs, so that the workers may stay alive.
    loader = datamanager.train_loader
    datamanager.train_loader = rebuilt(loader, loader.dataset, persistent_workers=loader.num_workers > 0)
    number = sum(parameter.numel() for parameter in model.parameters())
    print(f"Model {cfg.model.name}: {number:,} parameters; it starts from {weights}")
    build.check_takes(cfg, model)
    trained = frozenset[str]()
    if path := start.model.load_weights:
        state = checkpoint.load(path)
        loaded = checkpoint.fit_weights(model, state, path)
        if start.model.pretrained and loaded.lacks_layers:
            start.model.load_weights = ""  # The layers that the file lacks get ImageNet's weights.
            with distributed.one_first():
                model = build.build_model(start, datamanager.num_train_pids)
            loaded = checkpoint.fit_weights(model, state, path)
        print(loaded)
        if trained := checkpoint.people_of(state):
            names = cfg.data.sources if cfg.data.validation else cfg.data.targets
            cure = "test on other people (datasets.NAME.train and test), or start from other weights"
            allowed = "data.allow_overlap True allows it, also for other people of the same names"
            tested = _people(cfg, names, _test_items(datamanager))
            check_unseen(cfg, tested, trained, f"'{path}'", f"{cure}; {allowed}")
    criterion = build.build_criterion(cfg, model, datamanager.num_train_pids, steps_per_epoch(datamanager))
    optimizer = build.build_optimizer(cfg, model, criterion)
    scheduler = build.build_scheduler(cfg, optimizer)
    engine = build.build_engine(cfg, datamanager, model, optimizer, scheduler, criterion)
    engine.config, engine.on_resume = flat(cfg), {key: entry.on_resume for key, entry in KEYS.items()}
    engine.people = sorted(trained | _people(cfg, cfg.data.sources, datamanager.train_loader.dataset.train))
    return engine


def _people(cfg: Config, names: Sequence[str], items: Iterable[Any]) -> set[str]:
    """The people on the images of the named data sets that ``datasets`` describes; items of torchreid's data sets."""
    own = own_images(cfg, names)
    return {person(*own[item[0]]) for item in items if own and item[0] in own}


def _test_items(manager: Any) -> list[Any]:
    return [item for splits in manager.test_dataset.values() for items in splits.values() for item in items]


def check_unseen(cfg: Config, tested: Iterable[str], trained: Collection[str], name: str, cure: str) -> None:
    """Raises InputError if people of the test are among those on whom weights were trained, all named by ``person``,
    unless the configuration allows it; ``name``, of the weights, and ``cure`` are for the message."""
    both = sorted({*tested} & {*trained})
    if both and not (cfg.data.combineall or cfg.data.allow_overlap):
        what = f"{len(both)} people of this test, such as {both[0]!r}, are people that {name} was trained on"
        raise InputError(f"{what}: {cure}")


def _resumes(cfg: Config) -> bool:
    """Whether a run goes on from a checkpoint of ``model.resume``, so that it needs no other weights."""
    auto = cfg.model.resume == "auto"
    return bool(History(Path(cfg.data.save_dir, "model")).candidates() if auto else cfg.model.resume)


def train(cfg: Config) -> tuple[Any, dict[str, RetrievalResult]]:
    """Trains and tests as configured, from the checkpoint of ``model.resume``, if any. Returns the engine, and the
    results of the last test by target. Raises InputError as ``prepare``, and for a checkpoint that does not fit. Call
    ``check_start`` before."""
    engine = prepare(cfg)
    # The configuration keeps its own start_epoch, so that config.yaml starts the whole run again.
    start_epoch = cfg.train.start_epoch
    if cfg.model.resume:
        done = engine.resume(cfg.model.resume, cfg.data.save_dir, test_only=cfg.test.evaluate)
        start_epoch = done or start_epoch
        if cfg.test.evaluate and not done:
            untrained = f"model.resume {cfg.model.resume} found no checkpoint of a finished epoch"
            raise InputError(f"test.evaluate: {untrained}; test weights that are not a run's with model.load_weights")
    trains = not cfg.test.evaluate and start_epoch < cfg.train.max_epoch
    if trains and distributed.is_first():
        with replacing(Path(cfg.data.save_dir, "config.yaml")) as file:  # which --config-file reads again
            file.write(dumped(plain(cfg)).encode())
        if not start_epoch:  # of an earlier run in this folder
            Path(cfg.data.save_dir, "metrics.json").unlink(missing_ok=True)

    columns, options, folder = {}, run_options(cfg), Path(cfg.data.save_dir)
    if cfg.test.untrained and not cfg.test.evaluate and not start_epoch:
        print("=> Test before training")
        changed = {"visrank": False, "save_dir": str(folder / "untrained")}
        columns["untrained"] = engine.test(**options.last_test() | changed)
    columns["trained"] = engine.run(**options.arguments() | {"start_epoch": start_epoch})
    if len(columns) > 1 and trains:
        ranking.print_side_by_side(columns, cfg.test.ranks)
    parts = {"checkpoints": "model/*.pth.tar*", "TensorBoard log": "events.*", "metrics.json": "metrics.json"}
    if not cfg.test.evaluate:
        written = [name for name, pattern in parts.items() if any(folder.glob(pattern))]
        print(f'Written to "{folder}": {", ".join(written)}')
    return engine, columns["trained"]


def check_start(cfg: Config) -> None:
    """Raises InputError, before anything is written, for a ``data.save_dir`` that cannot be written or lies among the
    photos of a data set, a checkpoint or a file of weights that is not there, and data sets of ``datasets`` to train on
    that cannot be read; also if ``data.save_dir`` holds a trained run and this one does not resume it, but overwrites
    it, or would do so when torchrun restarts it."""
    distributed.from_first(lambda: _check_files(cfg))
    own_images(cfg, cfg.data.sources)
    folder, resume = Path(cfg.data.save_dir), cfg.model.resume
    if cfg.test.evaluate or resume == "auto":
        return
    if distributed.may_restart():
        raise InputError("torchrun --max-restarts: give model.resume auto, so that a restarted run goes on")
    if not (resume and Path(resume).parent.resolve() == (folder / "model").resolve()):
        check_new(folder)


def _check_files(cfg: Config) -> None:
    folder = Path(cfg.data.save_dir)
    place = next(filter(os.path.lexists, (folder, *folder.parents)), folder)
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        fault = "cannot be written" if os.path.isdir(place) else "is no folder"
        raise InputError(f"data.save_dir {cfg.data.save_dir!r}: '{place}' {fault}; give another folder")
    check_save_dir(cfg)
    file = cfg.model.resume if _resumes(cfg) else cfg.model.load_weights
    if file and file != "auto":
        checkpoint.check_file(file)


@contextlib.contextmanager
def logged(cfg: Config) -> Iterator[None]:
    """Writes the configuration and the output of the first process to ``train.log-TIME``, or ``test.log-TIME``, in
    ``data.save_dir``, and the error that ends the run, if any. Raises InputError if another run trains there."""
    folder, name = Path(cfg.data.save_dir), "test" if cfg.test.evaluate else "train"
    with contextlib.ExitStack() as stack:
        if name == "train":
            distributed.from_first(lambda: stack.enter_context(alone(folder)))
        if not distributed.is_first():
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.log-{time.strftime('%Y-%m-%d-%H-%M-%S')}"
        # The name of a file on disk may have bytes that are no UTF-8.
        file = stack.enter_context(open(path, "w", encoding="utf-8", errors="surrogateescape"))
        stack.enter_context(contextlib.redirect_stdout(_Tee(sys.stdout, file)))
        file.write(f"Configuration\n{cfg}\n\n")
        try:
            yield
        except (InputError, FloatingPointError, KeyboardInterrupt) as error:
            file.write(f"drsl-train: {message(error)}\n")
            raise
        except Exception:
            traceback.print_exc(file=file)
            raise


class _Tee:
    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()

    def isatty(self) -> bool:
        return False


class _EnoughError(Exception):
    """As many steps as a dry run takes."""


def dry_run(cfg: Config) -> None:
    """Prints the data sets and the size of the network, draws a batch and estimates the time of an epoch. Only the
    batch is kept, ``batch.png`` in ``data.save_dir``. Raises InputError for whatever a run would refuse before its
    first test; with data sets of ``datasets``, for images that cannot be read. Call ``check_start`` before."""
    if cfg.test.evaluate:
        raise InputError("test.evaluate True trains nothing, and --dry-run shows what is trained; leave one out")
    engine = prepare(cfg)
    done = (engine.resume(cfg.model.resume, cfg.data.save_dir) if cfg.model.resume else 0) or cfg.train.start_epoch
    if not cfg.datasets.keys().isdisjoint(cfg.data.sources + cfg.data.targets):
        _check_readable(engine.datamanager)
    steps = steps_per_epoch(engine.datamanager)
    batch, seconds = _try(cfg, engine, done, min(3, steps))
    path = Path(cfg.data.save_dir, "batch.png")
    images = engine.training_batch(batch).images.reshape(-1, 3, cfg.data.height, cfg.data.width)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.data.norm_mean, cfg.data.norm_std))
    if distributed.is_first():
        with replacing(path) as file:
            save_image(images.cpu() * std + mean, file, format="png", nrow=8, padding=0)
    print(f"A batch of {len(images)} images, as the network gets them, is drawn in {path}")
    epochs = max(0, cfg.train.max_epoch - done)
    whole = f"{epochs} epochs, without tests, about {epochs * steps * seconds / 60:.0f} min"
    print(f"An epoch of {steps} steps takes about {steps * seconds:.0f} s; {whole}")


def _check_readable(manager: Any) -> None:
    """Prints why images for training and test cannot be read, for the first ten; raises InputError if there are any."""
    paths = dict.fromkeys(item[0] for item in [*manager.train_loader.dataset.train, *_test_items(manager)])
    with ThreadPoolExecutor(available_cores()) as pool:
        read = pool.map(_damage, paths)
        damaged = [*filter(None, tqdm(read, "reading all images", len(paths), leave=False, disable=None))]
    if damaged:
        print(*damaged[:10], sep="\n")
        first = "" if len(damaged) <= 10 else "the first ten of "
        raise InputError(f"{len(damaged)} of {len(paths)} images cannot be read; {first}the reasons are above")


def _damage(path: str) -> str | None:
    try:
        read_image(path)
    except InputError as error:
        return str(error)
    return None


def _try(cfg: Config, engine: Any, done: int, steps: int) -> tuple[Any, float]:
    """The first batch after ``done`` epochs, and the seconds of the last of some steps (the first are slower) with its
    wait for the batch."""
    batches: list[Any] = []
    moments = [time.perf_counter()]
    step = engine.forward_backward

    def watched(batch: Any) -> Any:
        batches.append(batch)
        summary = step(batch)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # The step has ended once the GPU has.
        moments.append(time.perf_counter())
        if len(batches) == steps:
            raise _EnoughError
        return summary

    engine.forward_backward = watched
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, contextlib.suppress(_EnoughError):
        engine.run(**run_options(cfg).arguments() | {"save_dir": folder, "start_epoch": done, "max_epoch": done + 1})
    return batches[0], moments[-1] - moments[-2]
