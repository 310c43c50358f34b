"""The checkpoints of a run in their folder: one for each epoch that was saved, the last, and the best."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pml_drsl.checks import InputError
from torchreid_ext.checkpointing import file as checkpoint

LAST, BEST = "model-last.pth.tar", "model-best.pth.tar"


class History:
    """``FOLDER/model.pth.tar-EPOCH``, as torchreid names them, with ``model-last.pth.tar`` and ``model-best.pth.tar``.

    Args:
        folder: where they are; need not exist.
        keep: how many numbered ones to keep, >= 0; 0 keeps all. The last and the best are always kept.

    Attributes:
        newest: the checkpoint saved last by this object, or None.
        saved_epoch: its epoch, or -1.

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
        """Saves the state after ``epoch`` epochs and removes those of earlier ones that need not be kept.

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
        """Removes what was not finished, and those checkpoints up to ``epoch`` that need not be kept."""
        for unfinished in self.folder.glob(f".*{checkpoint.TEMPORARY}"):
            unfinished.unlink(missing_ok=True)
        # Those of later epochs are of another run: not ours to remove.
        numbered = self._numbered()
        earlier = sorted(number for number in numbered if number <= epoch)
        for number in earlier[: -self.keep] if self.keep else []:
            numbered[number].unlink()

    def load_newest(self, since: float = 0) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read and its state; None where there is none at all.

        Args:
            since: leave out those written before this time, in seconds since 1970.

        Raises:
            InputError: if there are some and none can be read.
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
                # The run may have been killed before it said so.
                checkpoint.link(path, BEST)
            return path, state
        if candidates:
            raise InputError(
                f"model.resume auto: none of the {len(candidates)} checkpoints in '{self.folder}' can be read; remove "
                f"them to start anew"
            )
        return None

    def _numbered(self) -> dict[int, Path]:
        names = {
            path: re.fullmatch(r"model\.pth\.tar-(\d+)", path.name) for path in self.folder.glob("model.pth.tar-*")
        }
        return {int(match[1]): path for path, match in names.items() if match}
