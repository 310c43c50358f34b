"""What a run is resumed from, and what becomes of one that is resumed with another configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pml_drsl.checks import InputError
from torchreid_ext.checkpointing import file as checkpoint
from torchreid_ext.checkpointing.folder import History
from torchreid_ext.runtime import distributed

# What the checkpoint was trained as: with another value its weights, or its optimizer's state, mean something else.
FIXED = {
    "model.name", "data.type", "data.sources", "data.split_id", "data.combineall", "cuhk03.labeled_images",
    "cuhk03.classic_split", "model.bnneck", "model.last_stride", "loss.name", "loss.pml.loss", "train.optim",
    "train.lr_scheduler", "train.warmup_epoch",
}  # fmt: skip

# What the optimizer's, the scheduler's or the generators' state holds, so that a new value does nothing.
KEPT = {
    "train.lr", "train.weight_decay", "train.staged_lr", "train.new_layers", "train.base_lr_mult", "train.stepsize",
    "train.gamma", "train.seed", "loss.pml.lr", "sgd.momentum", "sgd.dampening", "sgd.nesterov", "rmsprop.alpha",
    "adam.beta1", "adam.beta2",
}  # fmt: skip

# What says where a run starts from, or how it is shown, and is no part of the training.
FREE = {"model.resume", "model.load_weights", "data.save_dir", "train.print_freq", "train.timeout", "test.evaluate"}


def find(path: str, folder: Path, since: float = 0) -> tuple[str, dict[str, Any]] | None:
    """A checkpoint's path and state; for ``"auto"`` the newest in ``folder`` written at ``since`` or later, if any.

    Raises:
        InputError: as ``checkpoint.load`` and ``History.load_newest``.
    """
    if path != "auto":
        return path, checkpoint.load(path)
    found = History(folder).load_newest(since)
    return None if found is None else (str(found[0]), found[1])


def first_start(folder: Path) -> float | None:
    """When this run was first started, if torchrun has started it again since; None, and notes the time, if not."""
    if not distributed.launched():
        return None
    # A machine whose own processes did not die does not count it.
    again = distributed.largest(distributed.restarts()) > 0
    return distributed.from_first(lambda: _noted(folder / ".started", again, os.environ["TORCHELASTIC_RUN_ID"]))


def _noted(note: Path, again: bool, run: str) -> float | None:
    # It may be an earlier run's, if this one was started again before it could note anything.
    if again and note.exists() and note.read_text() == run:
        return note.stat().st_mtime
    note.write_text(run)
    return None


def check_fits(path: str, state: dict[str, Any], num_train_pids: int, config: dict[str, Any], test_only: bool) -> None:
    """Says how a checkpoint was trained otherwise than this run.

    Raises:
        InputError: for one of other identities, another number of processes unless ``test_only``, or a ``config`` that
            cannot change.
    """
    training = state.get("training")
    if training is None:
        print(f"'{path}' is torchreid's own and holds no random state: training goes on, but not as it would have")
        return
    if training["num_train_pids"] != num_train_pids:
        raise InputError(
            f"'{path}' was trained on {training['num_train_pids']} identities, and the sources have {num_train_pids}"
        )
    # Before there were several, nothing said so.
    processes = training.get("processes", 1)
    if processes != distributed.size() and not test_only:
        raise InputError(
            f"'{path}' was trained by {processes} processes, and this run has {distributed.size()}: start it with as "
            f"many (torchrun --nnodes times --nproc_per_node; one is drsl-train alone), or start anew in another "
            f"data.save_dir, from these weights with model.load_weights"
        )
    if training["config"] and config:
        for line in compare(training["config"], config):
            print(f"Config differs from the checkpoint's: {line}")


def compare(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A line for each key whose value differs between the configurations of a checkpoint and of this run.

    Args:
        saved: of the checkpoint, flat: dotted key and value.
        current: of this run.

    Raises:
        InputError: naming those that cannot change.
    """
    fixed = FIXED | {f"datasets.{name}" for name in saved.get("data.sources", [])}
    if saved.get("train.lr_scheduler") == "cosine":
        # Beyond the epoch it was made for, the cosine would rise again.
        fixed.add("train.max_epoch")
    lines, refused = [], []
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key), current.get(key)
        if before == now or key in FREE:
            continue
        line = f"{key}: {before!r} -> {now!r}"
        if key in fixed:
            refused.append(line)
        else:
            lines.append(line + (" (the checkpoint's is kept)" if key in KEPT else ""))
    if refused:
        raise InputError(
            f"cannot resume with another {'; '.join(refused)}. Set it back, or start anew in another data.save_dir, "
            f"from these weights with model.load_weights"
        )
    return lines
