"""Trains and tests a network from a config file, with torchreid's own command line."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from pml_drsl.checks import InputError
from pml_drsl.console import guarded, version
from pml_drsl.machine import keep_freed_memory
from torchreid_ext.cli.console import preload_workers

_quoted = subprocess.list2cmdline if os.name == "nt" else shlex.join

EPILOG = """config keys are those of torchreid's default_config.py, and more:
  drsl-train --list keys              all keys, with their defaults and what they are for
  drsl-train --list keys chunk        the keys that have the word in their name or text
  drsl-train --list models osnet      also: losses, miners, datasets

examples:
  drsl-train --config-file configs/demo.yaml
  drsl-train --config-file configs/omniglot.yaml --root FOLDER
  drsl-train --dry-run --config-file configs/demo.yaml
  drsl-train --config-file log/demo/config.yaml model.resume auto
  drsl-train --config-file log/demo/config.yaml model.resume auto test.evaluate True

exit status: 0; 2 for bad input or a loss that is not finite; 130 for Ctrl-C, 143 for SIGTERM, 129 for a closed terminal
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status, which :func:`pml_drsl.console.guarded` explains."""
    parser = argparse.ArgumentParser(
        "drsl-train", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--version", action="version", version=f"%(prog)s {version()}")
    add("--list", nargs="+", metavar=("WHAT", "WORD"),
        help="list keys, models, losses, miners or datasets: all, or those with WORD")  # fmt: skip
    add("--dry-run", action="store_true",
        help="list the data, load the network, open every image of your own data sets once, take up to three steps,\n"
        "draw one batch in data.save_dir and estimate the time; nothing of the training is kept")  # fmt: skip
    add("--config-file", metavar="FILE", help="YAML file of config keys")
    add("-s", "--sources", nargs="+", metavar="NAME", help="data sets to train on")
    add("-t", "--targets", nargs="+", metavar="NAME", help="data sets to test on")
    add("--transforms", nargs="+", metavar="NAME", help="augmentations")
    add("--root", metavar="FOLDER", help="folder that holds the data sets")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change, in pairs")
    args = parser.parse_args(arguments)
    if not any(vars(args).values()):
        parser.error("give a configuration, such as --config-file configs/demo.yaml; --help says more")
    return guarded("drsl-train", lambda: _list(*args.list) if args.list else _run(args), stopped="stopped")


def _run(args: argparse.Namespace) -> None:
    # These imports take seconds, because they import torch. --help does not wait for them.
    from torchreid_ext.config import KEYS, check, get_default_config, run
    from torchreid_ext.runtime import distributed

    keep_freed_memory()
    preload_workers()
    # The defaults are overridden by the file, then by the flags, then by the KEY VALUE pairs.
    cfg = get_default_config()
    if args.config_file:
        cfg.merge_from_file(args.config_file)
    for name in ("root", "sources", "targets", "transforms"):
        given = getattr(args, name)
        for word in given if isinstance(given, list) else ():
            if any(f"{word}.".startswith(f"{key}.") for key in KEYS):
                cure = f"another option, such as --root FOLDER, must stand between --{name} and the KEY VALUE pairs"
                raise InputError(f"--{name} takes the config key {word} for a name: {cure}")
        if given:
            cfg.merge_from_list([f"data.{name}", given])
    cfg.merge_from_list(args.opts)
    check(cfg)
    with distributed.joined(cfg.use_gpu, cfg.train.timeout):
        run.check_start(cfg)
        if args.dry_run:
            run.dry_run(cfg)
            return
        with run.logged(cfg):
            engine, _ = run.train(cfg)
            if cfg.data.type == "image" and not cfg.test.evaluate:
                query, _ = engine.datamanager.fetch_test_loaders(engine.datamanager.targets[0])
                print(next_commands(cfg.data.save_dir, query[0][0]))


def _list(what: str, *words: str) -> None:
    """Prints what a configuration can name, of which only the entries with the words in them, in any case."""
    import torchreid

    from torchreid_ext.config.keys import KEYS, SET_KEYS
    from torchreid_ext.engine.criteria import NOT_TRAINED, TABLES, parameters

    def classes(table: Mapping[str, type]) -> list[str]:
        return [f"{name}({', '.join(parameters(kind))})" for name, kind in table.items() if name not in NOT_TRAINED]

    sets = vars(torchreid.data.datasets)
    lists: dict[str, Iterable[str]] = {
        "keys": [f"{key} ({entry.default!r})\n    {entry.text}" for key, entry in (KEYS | SET_KEYS).items()],
        "models": sorted(vars(torchreid.models)["__model_factory"]),
        "losses": sorted(classes(TABLES["loss"])),
        "miners": sorted(classes(TABLES["miner"])),
        "datasets": [f"{name} ({kind})" for kind in ("image", "video") for name in sorted(sets[f"__{kind}_datasets"])],
    }
    if what not in lists:
        raise InputError(f"--list takes one of {', '.join(lists)}, got {what!r}")
    word = " ".join(words)
    found = [entry for entry in lists[what] if word.lower() in entry.lower()]
    if not found:
        raise InputError(f"none of the {what} has {word!r} in its name or text")
    print("\n".join(found))


def next_commands(save_dir: str, query: str) -> str:
    """The commands that a user would type next, with the paths of the run; empty if it saved no best checkpoint.
    ``save_dir`` is the folder of the run, and ``query`` one of the images that it looked up in its test."""
    from torchreid_ext.checkpoint.folder import BEST
    from torchreid_ext.search.sources import shown

    if not Path(save_dir, "model", BEST).is_file():
        return ""
    page, exported = str(Path(save_dir, "search.html")), str(Path(save_dir, "model.onnx"))
    return "\n  ".join([
        "Next, look a person up among the test images (--gallery FOLDER: in other photos), export the network, and see "
        "which searches fail:",
        _quoted([_program("drsl-search"), save_dir, "--query", shown(query), "--html", page]),
        _quoted([_program("drsl-export"), save_dir, exported]),
        _quoted([_program("drsl-evaluate"), save_dir, "--errors"]),
    ])  # fmt: skip


def _program(name: str) -> str:
    """How to start a command: beside drsl-train, where that is not on the path."""
    return name if shutil.which(name) else shutil.which(name, path=os.path.dirname(sys.argv[0]) or os.curdir) or name


if __name__ == "__main__":
    sys.exit(main())
