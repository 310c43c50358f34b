"""What the commands share: their options, how they print, and what they say when the input is bad.

Nothing at the top of this module imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

from torchreid_ext.runtime import terminal

# Control characters, which command a terminal, marks that turn the direction of writing, and bytes that are no UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def parser(name: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser with the checkpoint and the options that every command has.

    Args:
        name: of the command.
        description: what the command does.
        examples: command lines, one a line.
    """
    made = argparse.ArgumentParser(
        name,
        description=description,
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"{name} {terminal.version()}")
    made.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="for example log/demo/model/model-best.pth.tar, or the folder of a run, whose best checkpoint is taken",
    )
    made.add_argument(
        "--model",
        metavar="NAME",
        help="network of a checkpoint that holds no configuration, such as weights of torchreid's zoo: osnet_x0_25",
    )
    made.add_argument(
        "--config-file", metavar="FILE", help="YAML configuration of the network, for a checkpoint that holds none"
    )
    return made


def add_device(made: argparse.ArgumentParser) -> None:
    """Adds the options that say how features are extracted."""
    made.add_argument("--device", choices=["cpu", "cuda"], help="where to compute (the GPU where there is one)")
    made.add_argument(
        "--batch-size", type=int, metavar="N", help="images in a batch (test.batch_size of the configuration)"
    )
    made.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
        help="processes that read images (%(default)s)",
    )
    made.add_argument(
        "--skip-damaged", action="store_true", help="leave out images that cannot be read, and list them at the end"
    )
    made.add_argument(
        "--names",
        default="market",
        metavar="KIND",
        help="how names carry identities and cameras: market (0002_c1s1_000451_03.jpg), folder (anna/hall_1.jpg), "
        "msmt17, veri, or a regular expression with the groups identity and camera (%(default)s)",
    )


def say(text: str, file: TextIO | None = None) -> None:
    r"""Prints text; characters that would command the terminal, or that are no text, are written out: ``\x1b``."""
    print(_UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text), file=file)


def guarded(name: str, work: Callable[[], None], outputs: Sequence[str | None] = ()) -> int:
    """Runs a command, and explains on stderr in one line what stopped it.

    Args:
        name: of the command.
        work: what it does.
        outputs: the files that it may write. If it is interrupted, those that it has written are named.

    Returns:
        The exit status: 0; 2 for bad input or a missing package; 130 if interrupted; 141 if stdout was closed.
    """
    terminal.safe_streams()
    before = {path: _stamp(path) for path in outputs if path and path != "-"}
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has enough, such as head. Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        written = [path for path, stamp in before.items() if _stamp(path) != stamp]
        what = f"written before that: {', '.join(map(repr, written))}" if written else "nothing was written"
        say(f"{name}: interrupted; {what}", sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        text = _explained(error)
        if text is None:
            raise
        who = f" process {os.environ['RANK']}:" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        say(f"{name}:{who} {text}", sys.stderr)
        return 2
    return 0


def check_outputs(outputs: dict[str, str | None], inputs: Iterable[str | None]) -> None:
    """Refuses files to write that are in no folder, or that are an input or another output.

    Args:
        outputs: path of each option that names a file to write; None, empty and ``"-"`` are left out.
        inputs: the files that are read.

    Raises:
        InputError: for the first file that cannot be written.
    """
    from pml_drsl.checks import InputError

    others = dict.fromkeys((path for path in inputs if path and os.path.exists(path)), "which is read")
    for option, path in outputs.items():
        if not path or path == "-":
            continue
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise InputError(f"{option} {path}: that is not a file in a folder that exists")
        for other, what in others.items():
            both = os.path.exists(path) and os.path.exists(other)
            if os.path.realpath(path) == other or (both and os.path.samefile(path, other)):
                raise InputError(f"{option} {path} would overwrite {other!r}, {what}: give another name")
        others[os.path.realpath(path)] = f"the file of {option}"


def _explained(error: BaseException) -> str | None:
    """What bad input or a missing package comes to in one line; None for a defect of the program."""
    if isinstance(error, ModuleNotFoundError):
        return terminal.missing_package(error)
    from pml_drsl.checks import InputError

    return " ".join(str(error).split()) if isinstance(error, (InputError, OSError)) else None


def _stamp(path: str) -> object:
    """What changes when a file is replaced; None for a file that is not there."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns, about.st_size
