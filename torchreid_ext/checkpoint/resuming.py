"""Finds the checkpoint to resume from, and checks that the configuration matches it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pml_drsl.checks import InputError
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.checkpoint.folder import History
from torchreid_ext.runtime import distributed


def find(path: str, folder: Path, since: float = 0) -> tuple[str, dict[str, Any]] | None:
    """Returns the path and the state of a checkpoint, or None if there is none.

    For ``"auto"`` it is the newest checkpoint in ``folder`` that was written at the time ``since`` or later.

    Raises:
        InputError: as ``checkpoint.load`` and ``History.load_newest``.
    """
    if path != "auto":
        return path, checkpoint.load(path)
    found = History(folder).load_newest(since)
    return None if found is None else (str(found[0]), found[1])


def first_start(folder: Path) -> float | None:
    """Returns the time of the first start of this run, if torchrun has restarted it since.

    At the first start it writes a note with the time, and returns None.
    """
    if not distributed.launched():
        return None
    # A machine counts only the restarts of its own processes.
    again = distributed.largest(distributed.restarts()) > 0
    return distributed.from_first(lambda: _noted(folder / ".started", again, os.environ["TORCHELASTIC_RUN_ID"]))


def _noted(note: Path, again: bool, run: str) -> float | None:
    # The note may be from an earlier run, if this run was restarted before it could write a note.
    if again and note.exists() and note.read_text() == run:
        return note.stat().st_mtime
    note.write_text(run)
    return None


def check_fits(
    path: str,
    state: dict[str, Any],
    num_train_pids: int,
    config: dict[str, Any],
    on_resume: dict[str, str],
    test_only: bool,
) -> None:
    """Checks that a checkpoint fits this run, and prints the differences between their configurations.

    Raises:
        InputError: if the number of identities differs, if the number of processes differs (unless ``test_only``), or
            if a key of ``config`` differs that cannot change.
    """
    training = state.get("training")
    if training is None:
        print(f"'{path}' was saved by torchreid and has no random state: training goes on, but not exactly as before")
        return
    if training["num_train_pids"] != num_train_pids:
        raise InputError(
            f"'{path}' was trained on {training['num_train_pids']} identities, and the sources have {num_train_pids}"
        )
    # Older checkpoints, all from runs of one process, do not have this field.
    processes = training.get("processes", 1)
    if processes != distributed.size() and not test_only:
        raise InputError(
            f"'{path}' was trained by {processes} processes, and this run has {distributed.size()}: start it with the "
            f"same number (torchrun --nnodes times --nproc_per_node, or drsl-train alone for one process), or start a "
            f"new run in another data.save_dir, from these weights with model.load_weights"
        )
    if config and training["config"]:
        for line in compare(training["config"], config, on_resume):
            print(f"Config differs from the checkpoint's: {line}")


def compare(saved: dict[str, Any], current: dict[str, Any], on_resume: dict[str, str]) -> list[str]:
    """Returns a line for each key whose value differs between the configurations of a checkpoint and of this run.

    Args:
        saved: the configuration of the checkpoint, as dotted keys and values.
        current: the configuration of this run.
        on_resume: what a resumed run does with another value of a key: see ``torchreid_ext.runtime.options.Key``.

    Raises:
        InputError: if keys differ that cannot change; the message names them.
    """
    on_resume = on_resume | {f"datasets.{name}": "fixed" for name in saved.get("data.sources", [])}
    if saved.get("train.lr_scheduler") == "cosine":
        # After its last epoch, the cosine would rise again.
        on_resume["train.max_epoch"] = "fixed"
    lines, refused = [], []
    for key in sorted(saved.keys() | current.keys()):
        before, now, effect = saved.get(key), current.get(key), on_resume.get(key)
        if before == now or effect == "free":
            continue
        line = f"{key}: {before!r} -> {now!r}"
        # A key that the checkpoint lacks is newer than the checkpoint; by default it changes nothing.
        if effect == "fixed" and key in saved:
            refused.append(line)
        else:
            lines.append(line + (" (the checkpoint's is kept)" if effect == "kept" else ""))
    if refused:
        raise InputError(
            f"cannot resume with another {'; '.join(refused)}. Set it back, or start a new run in another "
            f"data.save_dir, from these weights with model.load_weights"
        )
    return lines
