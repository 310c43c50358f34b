"""Files that several processes may write at once: each is written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pml_drsl.checks import InputError
from pml_drsl.console import replacement


def link(path: Path, name: str) -> None:
    """Gives a file a second name in its folder, instead of the file that had it; a copy without hard links."""
    with replacement(path.with_name(name)) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files of ``replacement`` that killed processes left in a folder a day ago or earlier: who
    wrote a younger one may still run."""
    for path in folder.glob(f".*.{'[0-9a-f]' * 16}.tmp"):
        with contextlib.suppress(OSError):  # It may be another user's, or be gone.
            if time.time() - path.stat().st_mtime > 24 * 60 * 60:
                path.unlink()


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], refusal: str = "") -> Iterator[None]:
    """Context for reading, changing and writing a file, which need not exist: another process that wants to do so waits
    until its end, and says so on stderr, or raises InputError with its ``refusal``. ``.NAME.lock`` stands beside the
    file, or the target of a link, while it is locked. The lock of a killed process is free again. A thread that asks
    for its own lock once more gets a RuntimeError. Raises OSError if the folder cannot be written, or its file system
    has no locks."""
    path = Path(os.path.realpath(path))
    file = path.with_name(f".{path.name}.lock")
    # A soft lock, which is a file's mere existence, would outlive a killed process.
    lock = FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if refusal:
            raise InputError(refusal) from None
        print(f"waiting for another process that writes {os.fspath(path)!r}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        if os.name == "posix":  # A file that stays could keep other users out. On Windows, filelock removes it.
            file.unlink(missing_ok=True)
        lock.release()
