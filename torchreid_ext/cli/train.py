"""Trains and tests a network from a config file, with torchreid's own command line."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torchreid_ext.runtime import terminal

if TYPE_CHECKING:
    from torchreid_ext.config import Config

EPILOG = """config keys are those of torchreid's default_config.py, and more:
  drsl-train --list keys              all keys, with their defaults and what they are for
  drsl-train --list keys chunk        the keys that have the word in their name or text
  drsl-train --list models osnet      also: losses, miners, datasets

examples:
  drsl-train --config-file configs/demo.yaml
  drsl-train --config-file configs/omniglot.yaml --root FOLDER
  drsl-train --dry-run --config-file configs/demo.yaml
  drsl-train --config-file log/demo/config.yaml model.resume auto train.max_epoch 60
  drsl-train --config-file log/demo/config.yaml model.resume auto test.evaluate True
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Bad input, a loss that is not finite and an error of the file system are explained on stderr in one line. Any other
    error is a defect of the program: it is raised, so that its traceback is printed.

    Returns:
        The exit status: 0 for success, 2 for an error that is explained in one line, or 128 plus the number of the
        signal for a run that SIGTERM or SIGINT stopped.
    """
    terminal.safe_streams()
    parser = _parser()
    args = parser.parse_args(arguments)
    if not any(vars(args).values()):
        parser.print_usage(sys.stderr)
        print(
            "drsl-train: give a configuration, such as --config-file configs/demo.yaml; --help says more",
            file=sys.stderr,
        )
        return 2
    try:
        return _list(args.list) if args.list else _run(args)
    except ModuleNotFoundError as error:
        print(f"drsl-train: {terminal.missing_package(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "drsl-train", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {terminal.version()}")
    parser.add_argument("--list", nargs="+", metavar=("WHAT", "WORD"), help="list what there is, instead of training")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show data and network, draw a batch and estimate the time, instead of training",
    )
    parser.add_argument("--config-file", metavar="FILE", help="YAML file of config keys")
    parser.add_argument("-s", "--sources", nargs="+", metavar="NAME", help="data sets to train on")
    parser.add_argument("-t", "--targets", nargs="+", metavar="NAME", help="data sets to test on")
    parser.add_argument("--transforms", nargs="+", metavar="NAME", help="augmentations")
    parser.add_argument("--root", metavar="FOLDER", help="folder that holds the data sets")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change, in pairs")
    return parser


def _list(words: list[str]) -> int:
    from pml_drsl.checks import InputError
    from torchreid_ext.cli.lists import listed

    try:
        print(listed(words[0], " ".join(words[1:])))
    except InputError as error:
        print(f"drsl-train: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> int:
    # These imports take seconds, because they import torch. --help does not wait for them.
    from pml_drsl.checks import InputError
    from torchreid_ext.cli.dry_run import dry_run
    from torchreid_ext.cli.next_commands import next_commands
    from torchreid_ext.config.run import logged, message, train
    from torchreid_ext.runtime import distributed, memory

    memory.keep_freed_memory()
    try:
        cfg = read_config(args)
        if args.dry_run:
            dry_run(cfg)
            return 0
        folder, name = Path(cfg.data.save_dir), "test" if cfg.test.evaluate else "train"
        with distributed.joined(cfg.use_gpu, cfg.train.timeout), logged(folder, name):
            engine, _ = train(cfg)
            if cfg.data.type == "image" and not cfg.test.evaluate:
                manager = engine.datamanager
                splits = manager.fetch_test_loaders(manager.targets[0])
                print(next_commands(cfg.data.save_dir, *([item[0] for item in split] for split in splits)))
    except (InputError, FloatingPointError, OSError) as error:
        who = "" if distributed.is_first() else f" process {distributed.rank()}:"
        print(f"drsl-train:{who} {message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if distributed.is_first():
            print(f"drsl-train: {stop or 'stopped'}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    return 0


def read_config(args: argparse.Namespace) -> Config:
    """The configuration: the defaults, overridden by the file, then by the flags, then by the KEY VALUE pairs."""
    from torchreid_ext.config import check, get_default_config

    cfg = get_default_config()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    flags = {"root": args.root, "sources": args.sources, "targets": args.targets, "transforms": args.transforms}
    for name, value in flags.items():
        if value:
            cfg.data[name] = value
    cfg.merge_from_list(args.opts)
    check(cfg)
    return cfg


if __name__ == "__main__":
    sys.exit(main())
