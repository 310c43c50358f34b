"""The checkpoints of a run in their folder: which it writes when, which it keeps, and from which it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pml_drsl.checks import InputError
from torchreid_ext.checkpoint import checkpoint, states
from torchreid_ext.runtime import distributed, files

LAST, BEST = "model-last.pth.tar", "model-best.pth.tar"


class History:
    """``FOLDER/model.pth.tar-EPOCH``, as torchreid names them, with ``model-last.pth.tar`` and ``model-best.pth.tar``.

    The first checkpoint creates the folder. Of the numbered ones the newest ``keep`` are kept; 0 keeps all.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        self.folder, self.keep = folder, keep
        self.first = 1  # checkpoints of earlier epochs are not removed

    def save(self, state: dict[str, Any], epoch: int, is_best: bool = False) -> Path:
        """Saves the state after ``epoch`` epochs as ``checkpoint.save`` does, and removes those no longer kept."""
        path = self.folder / f"model.pth.tar-{epoch}"
        checkpoint.save(state, path)
        files.link(path, LAST)
        if is_best:
            files.link(path, BEST)
        self.tidy(epoch)
        return path

    def tidy(self, epoch: int) -> None:
        """Removes unfinished files, and the checkpoints up to ``epoch`` that are no longer kept."""
        files.remove_unfinished(self.folder)
        # Checkpoints of later epochs belong to another run, so this run does not remove them.
        numbered = self._numbered()
        earlier = sorted(number for number in numbered if self.first <= number <= epoch)
        for number in earlier[: -self.keep] if self.keep else []:
            numbered[number].unlink(missing_ok=True)

    def put_back_best(self, epoch: int) -> bool:
        """Makes ``model-best.pth.tar`` the checkpoint after ``epoch`` epochs: it may hold a later one, where a run goes
        back to an earlier epoch, or an earlier one, if the run was killed before it could mark the best. Without such a
        checkpoint it removes the file, and returns False."""
        for name in (BEST, f"model.pth.tar-{epoch}", LAST):
            with contextlib.suppress(InputError):
                if checkpoint.load(self.folder / name).get("epoch") == epoch:
                    if name != BEST:
                        files.link(self.folder / name, BEST)
                    return True
        (self.folder / BEST).unlink(missing_ok=True)
        return False

    def load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The path and the state of the newest readable checkpoint; None if there are no checkpoints. Raises InputError
        if there are checkpoints but none can be read."""
        for path in (candidates := self.candidates()):
            try:
                return path, checkpoint.load(path)
            except InputError as error:
                print(f"Skipped: {error}")
        if candidates:
            unreadable = f"none of the {len(candidates)} checkpoints in '{self.folder}' can be read"
            raise InputError(f"model.resume auto: {unreadable}; remove them to start a new run")
        return None

    def candidates(self) -> list[Path]:
        """The checkpoints, the newest first."""
        numbered = sorted(self._numbered().values(), key=lambda path: path.stat().st_mtime, reverse=True)
        paths = self.folder / LAST, *numbered
        return [path for path in paths if path.is_file()]

    def _numbered(self) -> dict[int, Path]:
        paths = {path.name.removeprefix("model.pth.tar-"): path for path in self.folder.glob("model.pth.tar-*")}
        return {int(number): path for number, path in paths.items() if number.isdecimal()}


def check_new(folder: Path) -> None:
    """Raises InputError if the folder of a new run holds trained checkpoints of another, which it would overwrite."""
    if done := max((max(History(part)._numbered(), default=0) for part in folder.glob("*/")), default=0):
        cure = "model.resume auto goes on with it; for a new run give data.save_dir log/second, or remove the folder"
        raise InputError(f"'{folder}' holds a run that was trained for {done} epoch(s): {cure}")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Context: makes the folder of a run and keeps other runs out of it, also those of other machines. A file system
    without locks lets them in. Raises InputError if another run is writing into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            other = f"another run is writing into '{folder}': give data.save_dir another folder"
            stack.enter_context(files.locked(folder / "run", refusal=other))
        yield


class RunCheckpoints(History):
    """The checkpoints that a run of an engine saves between epochs; the first of several processes writes the files.
    ``newest`` is its latest checkpoint, at first the one from which the run was resumed, or None."""

    def __init__(self, engine: Any, folder: Path, keep: int, newest: Path | None) -> None:
        super().__init__(folder, keep)
        self._engine, self.newest = engine, newest
        # A script may have read torchreid's checkpoint by itself. Those before it are not this run's either.
        self.first = (engine.host_epochs if newest else engine.options.start_epoch) + 1
        self.saved_epoch = -1  # the epoch of the checkpoint that this run saved last
        # The state in which the present epoch or test began, unless it is saved. Only the first process has all of it.
        self.start: dict[str, Any] | None = None
        self.stage = "its last test"

    def save(self, state: dict[str, Any], epoch: int, is_best: bool = False) -> Path:
        if self.newest is None and self._engine.start_epoch == 0:
            # An earlier run in this folder may have left the best of its own, which is not of this run.
            (self.folder / BEST).unlink(missing_ok=True)
        return super().save(state, epoch, is_best)

    def begin(self, epoch: int, test_due: bool = False) -> None:
        """Remembers the state after ``epoch`` epochs, in which the next epoch begins, or the test that is due; raises
        FloatingPointError if a weight is not finite."""
        self._check_finite(epoch)
        self.stage, self.start = f"the test after epoch {epoch}" if test_due else f"epoch {epoch + 1}", None
        if self.saved_epoch != epoch:
            state = states.copied(states.of_engine(self._engine, epoch)) if distributed.is_first() else {"epoch": epoch}
            self.start = state | {"test_due": test_due}

    def save_present(self, is_best: bool) -> None:
        """Saves the state after the present epoch; raises FloatingPointError if a weight is not finite."""
        engine, done = self._engine, self._engine.epoch + 1
        self._check_finite(done)
        path = distributed.from_first(lambda: self.save(states.of_engine(engine, done), done, is_best))
        self.newest, self.saved_epoch, self.start = path, done, None
        print(f'Checkpoint saved to "{path}"' + (f" (best so far: mAP {engine.best['mAP']:.1%})" if is_best else ""))

    def save_start(self) -> None:
        """Saves the state in which the present epoch or test began, unless it is saved; without the other processes."""
        if self.start is not None:
            path = self.folder / f"model.pth.tar-{self.start['epoch']}"
            self.newest = self.save(self.start, self.start["epoch"]) if distributed.is_first() else path
            self.start = None

    def interrupted(self) -> str:
        """Saves as ``save_start``; returns the end of the message to the user."""
        self.save_start()
        return f" in {self.stage}; model.resume auto begins it again from '{self.newest}'"

    def failed(self) -> None:
        """Saves as ``save_start`` after an error, if this run has trained an epoch, and prints where."""
        if self.start is not None and self.start["epoch"] > self._engine.start_epoch:
            with contextlib.suppress(OSError):  # The error may be that of a full disk or a closed terminal.
                self.save_start()
                print(f'The run failed in {self.stage}; model.resume auto begins it again from "{self.newest}"')

    def last_good(self) -> str:
        """The end of a message about weights or a loss that are not finite; saves as ``failed``."""
        self.failed()
        return f"; the last good checkpoint is '{self.newest}'" if self.newest else "; no checkpoint was saved"

    def _check_finite(self, epoch: int) -> None:
        if name := states.not_finite(self._engine):
            raise FloatingPointError(f"{name} is not finite after epoch {epoch}{self.last_good()}")
