"""Manages the checkpoints of a run in their folder: the numbered ones, the last and the best."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pml_drsl.checks import InputError
from torchreid_ext.checkpoint import checkpoint

LAST, BEST = "model-last.pth.tar", "model-best.pth.tar"


class History:
    """``FOLDER/model.pth.tar-EPOCH``, as torchreid names them, with ``model-last.pth.tar`` and ``model-best.pth.tar``.

    Args:
        folder: the folder of the checkpoints. It is created when the first checkpoint is saved.
        keep: number of numbered checkpoints to keep, >= 0; 0 keeps all. The last and the best are always kept.

    Attributes:
        newest: the checkpoint that this object saved last, or None.
        saved_epoch: the epoch of this checkpoint, or -1.

    Raises:
        InputError: for a negative ``keep``.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        if keep < 0:
            raise InputError(f"train.keep_checkpoints must be 0 (all) or more, got {keep}")
        self.folder, self.keep = folder, keep
        self.newest: Path | None = None
        self.saved_epoch = -1

    def save(self, state: dict[str, Any], epoch: int, is_best: bool = False) -> Path:
        """Saves the state after ``epoch`` epochs, and removes old checkpoints that are no longer kept.

        Raises:
            InputError, OSError: as ``checkpoint.save``.
        """
        path = self.folder / f"model.pth.tar-{epoch}"
        checkpoint.save(state, path)
        checkpoint.link(path, LAST)
        if is_best:
            checkpoint.link(path, BEST)
        self.tidy(epoch)
        self.newest, self.saved_epoch = path, epoch
        return path

    def tidy(self, epoch: int) -> None:
        """Removes unfinished files, and the checkpoints up to ``epoch`` that are no longer kept."""
        for unfinished in self.folder.glob(f".*{checkpoint.TEMPORARY}"):
            unfinished.unlink(missing_ok=True)
        # Checkpoints of later epochs belong to another run, so this run does not remove them.
        numbered = self._numbered()
        earlier = sorted(number for number in numbered if number <= epoch)
        for number in earlier[: -self.keep] if self.keep else []:
            numbered[number].unlink()

    def load_newest(self, since: float = 0) -> tuple[Path, dict[str, Any]] | None:
        """Returns the path and the state of the newest readable checkpoint, or None if there are no checkpoints.

        Args:
            since: time in seconds since 1970. Checkpoints that were written before it are ignored.

        Raises:
            InputError: if there are checkpoints but none can be read.
        """
        numbered = sorted(self._numbered().values(), key=lambda path: path.stat().st_mtime, reverse=True)
        named = [path for path in (self.folder / LAST, *numbered) if path.is_file()]
        candidates = [path for path in named if path.stat().st_mtime >= since]
        for path in candidates:
            try:
                state = checkpoint.load(path)
            except InputError as error:
                print(f"Skipped: {error}")
                continue
            if state.get("training", {}).get("best", {}).get("epoch") == state["epoch"]:
                # The run may have been killed before it could mark this checkpoint as the best.
                checkpoint.link(path, BEST)
            return path, state
        if candidates:
            raise InputError(
                f"model.resume auto: none of the {len(candidates)} checkpoints in '{self.folder}' can be read; remove "
                f"them to start a new run"
            )
        return None

    def _numbered(self) -> dict[int, Path]:
        names = {
            path: re.fullmatch(r"model\.pth\.tar-(\d+)", path.name) for path in self.folder.glob("model.pth.tar-*")
        }
        return {int(match[1]): path for path, match in names.items() if match}
