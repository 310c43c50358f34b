"""What every command shares: how it prints and writes, and what it says of bad input. It does not import torch."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import io
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TextIO

from pml_drsl.checks import InputError

# Control characters, which command a terminal, marks that turn the direction of writing, and bytes that are no UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# What torch says where memory is full: of a process that reads images, and in it.
_FULL = re.compile(
    r"DataLoader worker \(pid.*?\) (?:is killed by signal: (?:Bus error|Killed)|exited unexpectedly)"
    r"|unable to (?:allocate shared memory|write to file </torch_).*"
)


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
    with replacing(path) as file:
        file.write(text.encode(errors="surrogateescape"))  # The name of a file may have bytes that are not UTF-8.


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Context: opens a temporary file, which replaces ``path``, or the target of a link, when it is complete and safely
    on the disk. Of several writers, the last to finish wins. Raises OSError if the file cannot be written; ``path``
    keeps its old content."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacement(path) as temporary, open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno is not None and error.filename is None:  # The error of a full disk names no file.
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Context: the path of a temporary file to make, which replaces ``path`` at the end, or is removed at an error. A
    killed process leaves it. Its name is ``.NAME.`` with 16 hexadecimal digits and ``.tmp``."""
    # The name of the file is shortened, because file systems limit the length of a name.
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        _replace(temporary, path)
    finally:
        # Where both are names of one file already, os.replace does nothing and leaves the temporary one.
        temporary.unlink(missing_ok=True)
    # A renamed file survives a power failure only when its folder is on the disk too.
    if os.name == "posix":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Folders that a virtual machine or a network shares cannot be synced.
                raise
        finally:
            os.close(handle)


def _replace(source: Path, target: Path) -> None:
    """``os.replace``. On Windows it waits up to two seconds for who reads a file for a moment, such as a scanner."""
    for _ in range(20 if os.name == "nt" else 0):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(0.1)
    os.replace(source, target)


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
    bad input, a loss that is not finite or a missing package; 130 if interrupted (143 by SIGTERM, 129 by SIGHUP); 141
    if stdout was closed."""
    for each in ("stdout", "stderr"):
        if getattr(sys, each) is None:  # It was closed (>&-), or there is no console (pythonw).
            setattr(sys, each, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        stream = getattr(sys, each)  # which a path in another encoding than the terminal's would end
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
        _explain(f"{who} {str(stop) or stopped}" if process == "0" else "")
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", "pml_drsl", "torchreid_ext"):
            raise
        cure = f'run pip install -e ".[{extra}]" in the clone of this repository'
        _explain(f"{who} the package {error.name} is not installed: {cure}")
        return 2
    except (InputError, OSError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _FULL.search(str(error)):
            raise
        lines = re.split(r"\s*\n\s*", message(error).strip())
        _explain(f"{who} {' '.join(lines)}")
        return 2
    return status or 0


def _explain(text: str) -> None:
    try:
        if text:
            say(text, sys.stderr)
        sys.stdout.flush()
    except OSError:  # A terminal that was closed takes no text. Python would complain at its end.
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def message(error: BaseException) -> str:
    """The message of an error; of an error in a loading process, to which torch adds its traceback, the last line."""
    text = str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        return f"{text}: the disk of the output, the log or temporary files ($TMPDIR) is full; make room"
    if found := _FULL.search(text):
        full = "memory, or shared memory (df /dev/shm), may be full"
        return f"{found[0]}: {full}; take fewer processes that read images, or none: data.workers 0, or --workers 0"
    if "in DataLoader worker process" not in text:
        return text
    kind = type(error)
    return text.rstrip().splitlines()[-1].removeprefix(f"{kind.__module__}.").removeprefix(f"{kind.__name__}: ")


def check_outputs(outputs: dict[str, str | None], inputs: Iterable[str | None]) -> None:
    """Refuses files to write that are in no folder or in one that cannot be written, or that are an input or another
    output, with an ``InputError``. ``outputs`` has the path of each option that names such a file; None, empty and
    ``"-"`` are left out."""
    others = dict.fromkeys((path for path in inputs if path and os.path.exists(path)), "the input")
    for option, path in outputs.items():
        if not path or path == "-":
            continue
        if os.path.exists(path) and not os.path.isfile(path):  # Root would replace /dev/null.
            kind = "folder" if os.path.isdir(path) else "device or a pipe"
            raise InputError(f"{option} {path} is a {kind}: give the name of a file")
        if not (folder := Path(path).parent).is_dir():
            raise InputError(f"{option} {path}: there is no folder {str(folder)!r}: make it, or give another")
        # Of a link, the target is written.
        if not os.access(folder := Path(os.path.realpath(path)).parent, os.W_OK):
            raise InputError(f"{option} {path}: the folder {str(folder)!r} cannot be written: give another")
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
