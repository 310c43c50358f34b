"""The checkpoints that a run writes, and the state from which it repeats an interrupted epoch."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch

from torchreid_ext.checkpoint import states
from torchreid_ext.checkpoint.folder import History
from torchreid_ext.runtime import distributed


class RunCheckpoints:
    """Saves the state of an engine between epochs; the first of several processes writes the files.

    Args:
        engine: the engine.
        folder: folder of the checkpoints.
        keep: number of checkpoints to keep besides the last and the best; 0 keeps all.
        newest: the checkpoint from which the run was resumed, or None.
    """

    def __init__(self, engine: Any, folder: Path, keep: int, newest: Path | None) -> None:
        self._engine = engine
        self._history = History(folder, keep)
        self._history.newest = newest
        self._start: dict[str, Any] | None = None

    def begin_epoch(self) -> None:
        """Remembers the state in which an epoch begins, to be saved if the epoch is interrupted."""
        epoch = self._engine.epoch
        # A state that is saved already need not be kept in memory, and other processes than the first save nothing.
        needed = distributed.is_first() and self._history.saved_epoch != epoch
        self._start = states.copied(states.of_engine(self._engine, epoch)) if needed else None

    def save(self, is_best: bool) -> None:
        """Saves the state after the present epoch.

        Args:
            is_best: whether the latest test is the best so far.

        Raises:
            FloatingPointError: if a weight is not finite.
        """
        engine, history = self._engine, self._history
        done = engine.epoch + 1
        for model in engine._models.values():
            for name, weights in model.state_dict().items():
                if not torch.isfinite(weights).all():
                    raise FloatingPointError(f"{name} is not finite after epoch {done}{self.last_good()}")
        path = distributed.from_first(lambda: history.save(states.of_engine(engine, done), done, is_best))
        history.newest, history.saved_epoch = path, done
        print(f'Checkpoint saved to "{path}"' + (f" (best so far: mAP {engine.best['mAP']:.1%})" if is_best else ""))

    def interrupted(self, signum: int) -> str:
        """Saves the state in which the present epoch began, unless it is saved; returns the message to the user."""
        epoch = self._engine.epoch
        if self._start is not None:
            self._history.save(self._start, epoch)
        return (
            f"stopped by {signal.Signals(signum).name} in epoch {epoch + 1}; model.resume auto begins it again "
            f"from '{self._history.newest}'"
        )

    def tidy(self, epoch: int) -> None:
        """Removes the files that a run of ``epoch`` epochs would have removed, if it was killed before that."""
        if distributed.is_first():
            self._history.tidy(epoch)

    def forget_start(self) -> None:
        """Frees the memory of the state that ``begin_epoch`` keeps."""
        self._start = None

    def last_good(self) -> str:
        """The end of a message about weights or a loss that are not finite."""
        newest = self._history.newest
        return f"; the last good checkpoint is '{newest}'" if newest else "; no checkpoint was saved"
