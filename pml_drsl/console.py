"""What every command shares: how it prints, and what it says when the input is bad. It does not import torch."""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

from pml_drsl.checks import InputError

# Control characters, which command a terminal, marks that turn the direction of writing, and bytes that are no UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def version() -> str:
    """The version of the installed distribution, or ``"unknown"`` where none is installed."""
    try:
        return importlib.metadata.version("pml-drsl")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def say(text: str, file: TextIO | None = None) -> None:
    r"""Prints text; characters that would command the terminal, or that are no text, are written out: ``\x1b``."""
    print(_UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text), file=file)


def write_text(path: str, text: str) -> None:
    """Prints a text if ``path`` is ``"-"``, or writes it to a file, which keeps its old content until it is whole."""
    if path == "-":
        say(text.rstrip("\n"))
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}-{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def guarded(
    name: str,
    work: Callable[[], int | None],
    outputs: Sequence[str | None] = (),
    stopped: str = "interrupted; nothing was written",
    extra: str = "reid",
) -> int:
    """Runs a command, and explains on stderr in one line what stopped it. A defect of the program keeps its traceback.

    An interrupted command names the ``outputs`` that it has written, or says ``stopped``. ``extra`` is the extra of
    this distribution that installs what the command needs. Returns the exit status: 0, or what ``work`` returned; 2 for
    bad input, a loss that is not finite or a missing package; 130 if interrupted (143 by SIGTERM); 141 if stdout was
    closed."""
    for stream in (sys.stdout, sys.stderr):  # which a path in another encoding than the terminal's would end
        if isinstance(stream, io.TextIOWrapper):  # not so where a notebook or a test has replaced it
            stream.reconfigure(errors="backslashreplace")
    before = {path: file_stamp(path) for path in outputs if path and path != "-"}
    # In a run of several processes, all but the first give their number.
    process = os.environ.get("RANK", "0") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "0"
    who = f"{name}:" if process == "0" else f"{name}: process {process}:"
    try:
        status = work()
        sys.stdout.flush()
    except BrokenPipeError:  # Whoever read the output has enough, such as head. Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        if written := [path for path, stamp in before.items() if file_stamp(path) != stamp]:
            stopped = f"interrupted; written before that: {', '.join(map(repr, written))}"
        try:
            if process == "0":
                say(f"{who} {str(stop) or stopped}", sys.stderr)
            sys.stdout.flush()
        except OSError:  # A terminal that was closed takes no text. Python would complain at its end.
            for number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", "pml_drsl", "torchreid_ext"):
            raise
        say(f"{who} the package {error.name} is not installed: pip install 'pml-drsl[{extra}]'", sys.stderr)
        return 2
    except (InputError, OSError, FloatingPointError) as error:
        say(f"{who} {' '.join(message(error).split())}", sys.stderr)
        return 2
    return status or 0


def message(error: BaseException) -> str:
    """The message of an error; of an error in a loading process, to which torch adds its traceback, the last line."""
    text = str(error)
    if "in DataLoader worker process" not in text:
        return text
    kind = type(error)
    return text.rstrip().splitlines()[-1].removeprefix(f"{kind.__module__}.").removeprefix(f"{kind.__name__}: ")


def check_outputs(outputs: dict[str, str | None], inputs: Iterable[str | None]) -> None:
    """Refuses files to write that are in no folder, or that are an input or another output, with an ``InputError``.
    ``outputs`` has the path of each option that names such a file; None, empty and ``"-"`` are left out."""
    others = dict.fromkeys((path for path in inputs if path and os.path.exists(path)), "the input")
    for option, path in outputs.items():
        if not path or path == "-":
            continue
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise InputError(f"{option} {path}: that is not a file in a folder that exists")
        for other, what in others.items():
            both = os.path.exists(path) and os.path.exists(other)
            if os.path.realpath(path) == other or (both and os.path.samefile(path, other)):
                raise InputError(f"{option} {path} would overwrite {what} {other!r}: give another name")
        others[os.path.realpath(path)] = f"the file of {option}"


def file_stamp(path: str) -> object:
    """What changes with every write of a file; None for a file that is not there."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns, about.st_size
