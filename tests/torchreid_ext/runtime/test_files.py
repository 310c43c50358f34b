"""Files that several processes write: complete, never mixed, and never removed under a writer."""

import contextlib
import errno
import fcntl
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pml_drsl.console import replacement, replacing
from torchreid_ext.runtime import files

ROOT = Path(__file__).parents[3]
LOAD = """
import sys
from pathlib import Path
from pml_drsl.console import replacing
from torchreid_ext.runtime import files
path = Path(sys.argv[1])
"""
WRITE = """
letter = sys.argv[2].encode()
for _ in range(90):
    with replacing(path) as file:
        for _ in range(20):
            file.write(letter * 5000)
    files.link(path, "other name")
    files.remove_unfinished(path.parent)
"""
COUNT = """
for _ in range(50):
    with files.locked(path):
        number = int(path.read_text()) if path.exists() else 0
        with replacing(path) as file:
            file.write(str(number + 1).encode())
"""
HOLD = """
with files.locked(path):
    open(sys.argv[2], "w").close()
    sys.stdin.read()
"""


def start(script, *words):
    command = [sys.executable, "-c", LOAD + script, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced_holds_the_file_all_the_same(tmp_path, monkeypatch, number, fails):
    """A folder that VirtualBox shares answers EINVAL."""
    sync = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    expected = pytest.raises(OSError, match="Input/output") if fails else contextlib.nullcontext()
    with expected, replacing(tmp_path / "file") as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"), replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moments", [3, 1000])
def test_on_windows_a_file_that_is_read_for_a_moment_is_replaced_after_it(tmp_path, monkeypatch, moments):
    replace, refused = os.replace, iter(range(moments))

    def replaced(source, target):
        if next(refused, None) is not None:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "name", "nt")
    expected = pytest.raises(PermissionError) if moments > 20 else contextlib.nullcontext()
    with expected, replacement(path) as temporary:
        temporary.write_bytes(b"new")
    monkeypatch.undo()
    assert path.read_bytes() == (b"old" if moments > 20 else b"new") and len(list(tmp_path.iterdir())) == 1


def test_two_writers_of_one_path_never_fail_and_never_mix(tmp_path):
    path = tmp_path / "file"
    writers = [start(WRITE, path, letter) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        for name in ("file", "other name"):
            if (tmp_path / name).exists():
                content = (tmp_path / name).read_bytes()
                assert len(content) == 100_000 and len(set(content)) == 1
                seen.add(content[:1])
        time.sleep(0.002)
    finished(*writers)
    assert seen == {b"a", b"b"}
    assert sorted(os.listdir(tmp_path)) == ["file", "other name"]


def test_a_locked_file_loses_no_change(tmp_path):
    path = tmp_path / "count"
    finished(*(start(COUNT, path) for _ in range(3)))
    assert path.read_text() == "150"
    with files.locked(path), pytest.raises(RuntimeError, match="already held"), files.locked(path):
        pass
    assert os.listdir(tmp_path) == ["count"]


def test_a_process_that_waits_says_so_and_the_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "index"
    holder = start(HOLD, path, tmp_path / "on")
    try:
        while not (tmp_path / "on").exists():
            assert holder.poll() is None
            time.sleep(0.01)
        waiting = start("with files.locked(path): pass", path)
        assert waiting.stderr.readline() == f"waiting for another process that writes '{path}'\n"
        assert waiting.poll() is None
    finally:
        holder.kill()
        holder.communicate()
    finished(waiting)


def test_only_a_temporary_file_of_yesterday_is_removed(tmp_path):
    with replacement(tmp_path / "model") as left:
        left.write_bytes(b"half")
        files.remove_unfinished(tmp_path)
        assert left.exists()
        users = tmp_path / ".notes.tmp"
        users.touch()
        for path in (left, users):
            os.utime(path, (0, 0))
        files.remove_unfinished(tmp_path)
        assert [*tmp_path.iterdir()] == [users]
        left.touch()


def test_a_long_name_can_be_written(tmp_path):
    path = tmp_path / ("é" * 125)
    with replacing(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"


def test_a_link_stays_and_its_target_is_locked_and_written(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(Path("real", "file"))
    for content in (b"new", b"newer"):
        with files.locked(tmp_path / "link"):
            assert os.path.exists(tmp_path / "real" / ".file.lock")
            with replacing(tmp_path / "link") as file:
                file.write(content)
        assert (tmp_path / "real" / "file").read_bytes() == content
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "real") == ["file"]


def test_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half-way"), replacing(path) as file:
        file.write(b"new")
        raise RuntimeError("half-way")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def unsupported(file, flag):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(OSError, match="no locks here"), files.locked(tmp_path / "index"):
        pass
