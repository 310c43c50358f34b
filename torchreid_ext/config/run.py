"""Trains and tests as a configuration says, and keeps a log of it."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

from pml_drsl.checks import InputError
from pml_drsl.evaluation.scores import RetrievalResult
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.checkpoint.folder import first_start
from torchreid_ext.config.build import (
    build_criterion,
    build_engine,
    build_model,
    build_optimizer,
    build_scheduler,
    check_takes,
)
from torchreid_ext.config.checks import run_options
from torchreid_ext.config.data import build_datamanager
from torchreid_ext.config.keys import ON_RESUME
from torchreid_ext.config.node import Config, flat, plain
from torchreid_ext.data.samplers import steps_per_epoch
from torchreid_ext.evaluation import ranking
from torchreid_ext.runtime import distributed, files, generators


def prepare(cfg: Config) -> Any:
    """Seeds the generators, and builds the engine of a configuration with all that it needs.

    Raises:
        InputError: for a value that cannot be used, or missing data.
    """
    if cfg.test.evaluate and not (cfg.model.resume or cfg.model.load_weights):
        raise InputError(
            "test.evaluate True tests a trained network, and there is none: give its checkpoint with model.resume FILE "
            "or model.load_weights FILE. To test a network before any training, set test.untrained True and "
            "train.max_epoch 0 instead"
        )
    try:
        cfg.data.save_dir.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"data.save_dir {cfg.data.save_dir!r} has bytes that are not UTF-8, and TensorBoard cannot write there: "
            f"choose another name"
        ) from error
    generators.seed_everything(cfg.train.seed)
    with distributed.one_first():
        datamanager = build_datamanager(cfg)
        model = build_model(cfg, datamanager.num_train_pids)
    print(f"Model {cfg.model.name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    check_takes(cfg, model)
    if cfg.model.load_weights:
        print(checkpoint.load_weights(model, cfg.model.load_weights))
    criterion = build_criterion(cfg, model, datamanager.num_train_pids, steps_per_epoch(datamanager))
    optimizer = build_optimizer(cfg, model, criterion)
    engine = build_engine(cfg, datamanager, model, optimizer, build_scheduler(cfg, optimizer), criterion)
    engine.config, engine.on_resume = flat(cfg), ON_RESUME
    return engine


def train(cfg: Config) -> tuple[Any, dict[str, RetrievalResult]]:
    """Trains and tests as configured, from the checkpoint of ``model.resume``, if there is one.

    Returns:
        The engine, and the results of the last test by target.

    Raises:
        InputError: as ``prepare``, and for a checkpoint that does not fit.
    """
    print(f"Configuration\n{cfg}\n")
    since = first_start(Path(cfg.data.save_dir))
    engine = prepare(cfg)
    # The configuration keeps its own start_epoch, so that config.yaml starts the whole run again.
    start_epoch = cfg.train.start_epoch
    if since is not None and (done := engine.resume("auto", cfg.data.save_dir, since)):
        start_epoch = done
    elif cfg.model.resume:
        start_epoch = engine.resume(cfg.model.resume, cfg.data.save_dir, test_only=cfg.test.evaluate)
        if cfg.test.evaluate and not start_epoch:
            raise InputError("test.evaluate: model.resume auto found no checkpoint to test")
    if not cfg.test.evaluate and distributed.is_first():
        write_config(cfg)

    columns, options = {}, run_options(cfg)
    if cfg.test.untrained and not cfg.test.evaluate and not start_epoch:
        print("=> Test before training")
        folder = str(Path(cfg.data.save_dir, "untrained"))
        columns["untrained"] = engine.test(**options.last_test() | {"visrank": False, "save_dir": folder})
    columns["trained"] = engine.run(**options.arguments() | {"start_epoch": start_epoch})
    if len(columns) > 1 and columns["trained"]:
        ranking.print_side_by_side(columns, cfg.test.ranks)
    print(_written(Path(cfg.data.save_dir)))
    return engine, columns["trained"]


def write_config(cfg: Config) -> None:
    """Writes the whole configuration to ``config.yaml`` beside the results. ``--config-file`` reads it again."""
    with files.replacing(Path(cfg.data.save_dir, "config.yaml")) as file:
        file.write(yaml.safe_dump(plain(cfg), sort_keys=False).encode())


def _written(folder: Path) -> str:
    """What a run left in its folder, in words."""
    parts = {"checkpoints": "model/*.pth.tar*", "TensorBoard log": "events.*", "metrics.json": "metrics.json"}
    found = [name for name, pattern in parts.items() if any(folder.glob(pattern))]
    return f'Written to "{folder}": {", ".join(found)}'


@contextlib.contextmanager
def logged(folder: Path, name: str) -> Iterator[None]:
    """Copies the output of the first process to ``folder/NAME.log-TIME``, and the error that ends the run, if any."""
    if not distributed.is_first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.log-{time.strftime('%Y-%m-%d-%H-%M-%S')}"
    # The name of a file on disk may have bytes that are no UTF-8.
    with (
        open(path, "w", encoding="utf-8", errors="surrogateescape") as file,
        contextlib.redirect_stdout(_Tee(sys.stdout, file)),
    ):
        try:
            yield
        except (InputError, FloatingPointError, KeyboardInterrupt) as error:
            file.write(f"drsl-train: {message(error)}\n")
            raise
        except Exception:
            traceback.print_exc(file=file)
            raise


def message(error: BaseException) -> str:
    """The message of an error; of an error in a loading process, to which torch adds its traceback, the last line."""
    text = str(error)
    if "in DataLoader worker process" not in text:
        return text
    kind = type(error)
    last = text.rstrip().splitlines()[-1]
    return last.removeprefix(f"{kind.__module__}.").removeprefix(f"{kind.__name__}: ")


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
