"""Files that several processes may write at once: each is written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pml_drsl.console import replacement

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


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
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 24 * 60 * 60:
                path.unlink()


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context for reading, changing and writing a file, which need not exist: another process that wants to do so waits
    until its end, and says so on stderr. ``.NAME.lock`` stands beside the file, or the target of a link, while it is
    locked. The lock of a killed process is free again. A process that asks for its own lock once more waits for itself.
    Raises OSError if the folder cannot be written, or its file system has no locks."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(lock, "ab"))
            if not _acquired(file, wait=False):
                print(f"waiting for another process that writes {os.fspath(path)!r}", file=sys.stderr, flush=True)
                _acquired(file, wait=True)
            # The process that had the lock removed the file; then the lock of the removed file protects nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                    break
            file.close()
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # Windows does not remove a file that is open.
                lock.unlink()


def _acquired(file: IO[bytes], wait: bool) -> bool:
    """Locks an open file until it is closed; without ``wait`` it returns False where another process has the lock."""
    while True:
        try:
            if sys.platform == "win32":
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except (BlockingIOError, PermissionError):
            if not wait:
                return False
            time.sleep(0.1)
