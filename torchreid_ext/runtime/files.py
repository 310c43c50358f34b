"""Files that several processes may write at once: each is written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# Names the machine in the name of a temporary file: processes are numbered on each machine anew.
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY = re.compile(r"\..*\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Context: opens a temporary file, which replaces ``path``, or the target of a link, when it is complete and safely
    on the disk. Of several writers, the last to finish wins. Raises OSError if the file cannot be written; ``path``
    keeps its old content."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def link(path: Path, name: str) -> None:
    """Gives a file a second name in its folder, instead of the file that had it; a copy without hard links."""
    second = path.with_name(name)
    temporary = _temporary(second)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, second)
    # If both names already belonged to one file, os.replace does nothing and leaves the temporary name.
    temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files that processes of this machine left in a folder when they were killed. A file of a
    process that still runs stays. A file from another machine is removed when it is a day old."""
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):
            if match and _is_left(path, match[1], int(match[2])):
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


def _temporary(path: Path) -> Path:
    # The name of the file is shortened, because file systems limit the length of a name.
    return path.with_name(f".{path.name[:40]}.{_MACHINE}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _is_left(path: Path, machine: str, process: int) -> bool:
    if machine != _MACHINE or os.name != "posix":
        return time.time() - path.stat().st_mtime > 24 * 60 * 60
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # It runs as another user.
    return False


def _sync_folder(folder: Path) -> None:
    # A renamed file survives a power failure only when its folder is on the disk too.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
