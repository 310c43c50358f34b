"""The launcher: trains and tests from a config file, with torchreid's own command line."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

from pml_drsl.checks import InputError
from torchreid_ext.checkpoint import checkpoint, resuming
from torchreid_ext.cli.next_commands import next_commands
from torchreid_ext.config import build as config
from torchreid_ext.config.keys import describe
from torchreid_ext.data.samplers import steps_per_epoch
from torchreid_ext.evaluation import ranking
from torchreid_ext.runtime import distributed, generators

EPILOG = """examples:
  drsl-train --config-file configs/demo.yaml
  drsl-train --config-file configs/omniglot.yaml --root FOLDER
  drsl-train --config-file configs/osnet_x1_0_drsl.yaml -s msmt17 -t msmt17 --root reid-data train.max_epoch 60

config keys, with their defaults:
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Bad input, a loss that is not finite and an error of the file system are explained on stderr in one line. Any other
    error is a defect of the program: it is raised, so that its traceback is printed.

    Returns:
        The exit status: 0 for success, 2 for an error that is explained in one line, or 128 plus the number of the
        signal for a run that SIGTERM or SIGINT stopped.
    """
    args = _parser().parse_args(arguments)
    try:
        cfg = read_config(args)
        with (
            distributed.joined(cfg.use_gpu, cfg.train.timeout),
            logged(Path(cfg.data.save_dir), "test" if cfg.test.evaluate else "train"),
        ):
            train(cfg)
    except (InputError, FloatingPointError, OSError) as error:
        who = "" if distributed.is_first() else f" process {distributed.rank()}:"
        print(f"drsl-train:{who} {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if distributed.is_first():
            print(f"drsl-train: {stop or 'stopped'}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    return 0


def _message(error: BaseException) -> str:
    """The message of an error; of an error in a loading process, to which torch adds its traceback, the last line."""
    message = str(error)
    if "in DataLoader worker process" not in message:
        return message
    kind = type(error)
    last = message.rstrip().splitlines()[-1]
    return last.removeprefix(f"{kind.__module__}.").removeprefix(f"{kind.__name__}: ")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "drsl-train", description=__doc__, epilog=EPILOG + describe(), formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config-file", metavar="FILE", help="YAML file of config keys")
    parser.add_argument("-s", "--sources", nargs="+", metavar="NAME", help="data sets to train on")
    parser.add_argument("-t", "--targets", nargs="+", metavar="NAME", help="data sets to test on")
    parser.add_argument("--transforms", nargs="+", metavar="NAME", help="augmentations")
    parser.add_argument("--root", metavar="FOLDER", help="folder that holds the data sets")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change, in pairs")
    return parser


def read_config(args: argparse.Namespace) -> config.Config:
    """The configuration: the defaults, overridden by the file, then by the flags, then by the KEY VALUE pairs."""
    cfg = config.get_default_config()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    flags = {"root": args.root, "sources": args.sources, "targets": args.targets, "transforms": args.transforms}
    for name, value in flags.items():
        if value:
            cfg.data[name] = value
    cfg.merge_from_list(args.opts)
    config.check(cfg)
    return cfg


def train(cfg: config.Config) -> dict[str, Any]:
    """Trains and tests as configured; returns the results of the last test by target."""
    print(f"Configuration\n{cfg}\n")
    since = resuming.first_start(Path(cfg.data.save_dir))
    generators.seed_everything(cfg.train.seed)
    with distributed.one_first():
        datamanager = config.build_datamanager(cfg)
        model = config.build_model(cfg, datamanager.num_train_pids)
    print(f"Model {cfg.model.name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    if cfg.model.load_weights:
        print(checkpoint.load_weights(model, cfg.model.load_weights))
    criterion = config.build_criterion(cfg, model, datamanager.num_train_pids, steps_per_epoch(datamanager))
    optimizer = config.build_optimizer(cfg, model, criterion)
    scheduler = config.build_scheduler(cfg, optimizer)
    engine = config.build_engine(cfg, datamanager, model, optimizer, scheduler, criterion)
    engine.config = config.flat(cfg)
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

    columns, options = {}, config.run_options(cfg)
    if cfg.test.untrained and not cfg.test.evaluate and not start_epoch:
        print("=> Test before training")
        folder = str(Path(cfg.data.save_dir, "untrained"))
        columns["untrained"] = engine.test(**options.test_between() | {"rerank": options.rerank, "save_dir": folder})
    columns["trained"] = engine.run(**options.arguments() | {"start_epoch": start_epoch})
    if len(columns) > 1:
        ranking.print_side_by_side(columns, cfg.test.ranks)
    print(f'Checkpoints, TensorBoard log and metrics.json are in "{cfg.data.save_dir}"')
    if cfg.data.type == "image" and not cfg.test.evaluate:
        query, gallery = (
            [item[0] for item in split] for split in datamanager.fetch_test_loaders(datamanager.targets[0])
        )
        print(next_commands(cfg.data.save_dir, query, gallery))
    return columns["trained"]


def write_config(cfg: config.Config) -> None:
    """Writes the whole configuration to ``config.yaml`` beside the results. ``--config-file`` reads it again."""
    with checkpoint.replacing(Path(cfg.data.save_dir, "config.yaml")) as file:
        file.write(yaml.safe_dump(config.plain(cfg), sort_keys=False).encode())


@contextlib.contextmanager
def logged(folder: Path, name: str) -> Iterator[None]:
    """Copies the output of the first process to ``folder/NAME.log-TIME``, and the error that ends the run, if any."""
    if not distributed.is_first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.log-{time.strftime('%Y-%m-%d-%H-%M-%S')}"
    with open(path, "w") as file, contextlib.redirect_stdout(_Tee(sys.stdout, file)):
        try:
            yield
        except (InputError, FloatingPointError, KeyboardInterrupt) as error:
            file.write(f"drsl-train: {_message(error)}\n")
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


if __name__ == "__main__":
    sys.exit(main())
