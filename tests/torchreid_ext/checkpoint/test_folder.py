"""The folder of checkpoints: which are kept, and which is the last, the best and the newest readable one."""

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch

from pml_drsl.checks import InputError
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.checkpoint.folder import BEST, LAST, History, alone


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def numbered(*epochs):
    return [f"model.pth.tar-{epoch}" for epoch in epochs]


def save(history, epochs, best=()):
    for epoch in epochs:
        history.save({"epoch": epoch}, epoch, is_best=epoch in best)


@pytest.mark.parametrize(("keep", "kept"), [(0, range(8, 13)), (1, [12]), (2, [11, 12]), (9, range(8, 13))])
def test_the_latest_are_kept(tmp_path, keep, kept):
    history = History(tmp_path, keep)
    save(history, range(8, 13), best=[8, 9])
    assert names(tmp_path) == sorted([BEST, LAST, *numbered(*kept)])
    assert checkpoint.load(tmp_path / LAST) == {"epoch": 12}
    assert checkpoint.load(tmp_path / BEST) == {"epoch": 9}


def test_checkpoints_of_another_run_are_not_removed(tmp_path):
    save(History(tmp_path), [50, 60])
    history = History(tmp_path, keep=1)
    save(history, [1, 2])
    assert names(tmp_path) == sorted([LAST, *numbered(2, 50, 60)])
    # The newest checkpoint belongs to this run, whatever its number is.
    assert history.load_newest()[1] == {"epoch": 2}


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    save(History(tmp_path), [1, 2], best=[1])
    assert [checkpoint.load(tmp_path / name)["epoch"] for name in (LAST, BEST)] == [2, 1]


def test_damaged_checkpoints_are_skipped_and_named(tmp_path, capsys):
    history = History(tmp_path)
    assert History(tmp_path / "nowhere").load_newest() is None
    save(history, [1, 2, 3])
    for epoch in (1, 2, 3):
        # The order in which they were written, because the clock may be too coarse.
        os.utime(tmp_path / f"model.pth.tar-{epoch}", (epoch, epoch))
    # The last checkpoint has two names.
    (tmp_path / "model.pth.tar-3").write_bytes(b"PK")
    path, state = history.load_newest()
    assert (path.name, state) == ("model.pth.tar-2", {"epoch": 2})
    assert capsys.readouterr().out.count("is damaged") == 2
    for epoch in (1, 2):
        (tmp_path / f"model.pth.tar-{epoch}").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 4 checkpoints in .* can be read; remove them"):
        history.load_newest()


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), OSError, "Input/output error"),
        (OSError(errno.EINVAL, "Invalid argument"), InputError, "none of the 2 checkpoints .* remove"),
        (MemoryError(), OSError, "Cannot allocate memory: .*model-last"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError, "Cannot allocate memory: .*model-last"),
    ],
)
def test_a_disk_or_a_memory_that_fails_damages_no_checkpoint(tmp_path, monkeypatch, error, raised, message):
    history = History(tmp_path)
    save(history, [1])

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(raised, match=message):
        history.load_newest()


def test_a_damaged_checkpoint_may_ask_for_any_memory(tmp_path, monkeypatch):
    (tmp_path / "cut.pth").write_bytes(b"PK")
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=MemoryError()))
    with pytest.raises(InputError, match="is damaged"):
        checkpoint.load(tmp_path / "cut.pth")


def test_a_best_checkpoint_is_marked_after_a_kill(tmp_path):
    history = History(tmp_path)
    for epoch in (1, 2):
        history.save({"epoch": epoch}, epoch, is_best=epoch == 1)
    # The run was killed after it saved the checkpoint, and before it marked it as the best.
    assert checkpoint.load(tmp_path / BEST)["epoch"] == 1
    # Whoever copies a run may take its last checkpoint alone.
    for removed in ((), (BEST, *numbered(1, 2))):
        for name in removed:
            (tmp_path / name).unlink()
        assert history.put_back_best(2)
        assert checkpoint.load(tmp_path / BEST)["epoch"] == 2
    assert not history.put_back_best(1) and names(tmp_path) == [LAST]


def test_an_older_best_checkpoint_stays_the_best(tmp_path):
    save(history := History(tmp_path, keep=1), [1, 2], best=[1])
    assert history.put_back_best(1)
    assert names(tmp_path) == sorted([LAST, BEST, *numbered(2)]) and checkpoint.load(tmp_path / BEST)["epoch"] == 1


def test_two_runs_do_not_write_into_one_folder_at_once(tmp_path, monkeypatch):
    log = tmp_path / "deep" / "log"
    # A thread of its own stands for another process.
    with ThreadPoolExecutor() as pool, alone(log):
        refusal = f"another run is writing into '{log}': give data.save_dir another folder"
        with pytest.raises(InputError, match=refusal):
            pool.submit(alone(log).__enter__).result()
    assert not names(log)

    def unsupported(file, flag):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with alone(tmp_path / "without locks"):
        assert (tmp_path / "without locks").is_dir()
