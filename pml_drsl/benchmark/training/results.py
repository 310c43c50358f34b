"""The file of results: one JSON object per line, one line per data set and one per run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pml_drsl.benchmark.training.networks import Recipe
from pml_drsl.benchmark.training.sets import BenchmarkSet
from pml_drsl.benchmark.training.trial import Trial
from pml_drsl.checks import InputError


class Results:
    """The results in a file, by trial.

    Attributes:
        sets: what the file says of each data set, see ``BenchmarkSet.described``.
        found: the line of each run, by ``Trial.key``.
        costs: what a training step costs, by the names of the set and of the loss.

    Raises:
        InputError: for a file that cannot be read, or a line that is no result. A last line cut short, by a machine
            that went down while the line was written, does not count: its trial runs again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sets: dict[str, dict[str, Any]] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self.costs: dict[str, dict[str, Any]] = {}
        self._seeds: dict[str, dict[int, Trial]] = {}
        self.file: BinaryIO | None = None
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number} is not a result of this benchmark: {error!r}") from None

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Results]:
        """The results in a file that no other process adds to meanwhile. A last line cut short is removed.

        Raises:
            InputError: for a file that cannot be written, or that another process adds to.
        """
        try:
            file = path.open("a+b")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}; give another --results") from None
        with file:
            _lock(file)
            file.seek(0)
            text = file.read()
            results = cls(path)  # refuses a file of something else before anything in it changes
            file.truncate(text.rfind(b"\n") + 1)
            results.file = file
            yield results

    def _take(self, row: dict[str, Any]) -> None:
        if "set" in row:
            Recipe(**row["set"]["recipe"])
            self.sets[row["set"]["name"]] = row["set"]
        elif "costs" in row:
            if "on" in row:  # lines of 0.2.0 do not say of which set they are
                self.costs[row["on"]] = row["costs"]
        else:
            trial = Trial(**row["trial"])
            self.found[trial.key] = row
            self._seeds.setdefault(trial.any_seed.key, {})[trial.seed] = trial

    def agree(self, of_set: BenchmarkSet) -> None:
        """Adds a data set to the file. Raises InputError if the file has another set or recipe by its name."""
        asked = of_set.described()
        here = self.sets.get(of_set.name)
        if here is None:
            self._write({"set": asked})
            return
        here, asked = ({**one, **one["recipe"], "recipe": None} for one in (here, asked))
        differences = [f"{key} {here[key]!r}, not {value!r}" for key, value in asked.items() if here[key] != value]
        if differences:
            raise InputError(
                f"{self.path} holds results of another {of_set.name}: {', '.join(differences)}; give another --results"
            )

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self.found

    def score(self, trial: Trial, name: str = "") -> float:
        """A score of a trial in the file; the one that ranks losses on its set by default. A failed run scores 0."""
        return float(self.found[trial.key]["scores"].get(name or self.sets[trial.set]["score"], 0.0))

    def seeds(self, trial: Trial) -> list[Trial]:
        """The trial with each seed that there is a result of, in order of seed."""
        found = self._seeds.get(trial.any_seed.key, {})
        return [found[seed] for seed in sorted(found)]

    def trials(self) -> list[Trial]:
        return [Trial(**row["trial"]) for row in self.found.values()]

    def add(self, trial: Trial, row: dict[str, Any]) -> None:
        self._write({"trial": dataclasses.asdict(trial), **row})

    def add_costs(self, name: str, costs: dict[str, Any]) -> None:
        self._write({"costs": costs, "on": name})

    def _write(self, row: dict[str, Any]) -> None:
        assert self.file is not None, "only results that are opened can be added to"
        self.file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self._take(row)


def _lock(file: BinaryIO) -> None:
    """Keeps others from adding to the file until it is closed, or this process ends, in whatever way."""
    try:
        import fcntl
    except ImportError:  # Windows, whose locks would keep readers out too
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"another drsl-benchmark is adding to {file.name}; wait for its end, or give another --results"
        ) from None
    except OSError:  # a file system without locks
        return
