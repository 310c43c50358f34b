"""A file of results, one JSON object per line, and the runs that add to it: what is there is not run again."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytorch_metric_learning
import torch
from tqdm import tqdm

from pml_drsl.benchmark.timing.measure import clean_processes
from pml_drsl.benchmark.training.candidates import TRIALS
from pml_drsl.benchmark.training.images import Data
from pml_drsl.benchmark.training.trial import Trial, run
from pml_drsl.checks import InputError


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What the trials of one file have in common: its first line.

    Attributes:
        base: what they start from; its split is ``"test"``.
        tuning_seeds: how often the finalists among the trials on the validation identities run.
        tried: settings of every loss that are tried, at most.
    """

    base: Trial
    tuning_seeds: int
    tried: int = TRIALS

    @property
    def validation(self) -> Trial:
        return self.base.but(split="validation")


class Results:
    """The results in a file, by trial.

    Raises:
        InputError: for a file that cannot be read, or a line that is no result. A last line cut short, by a machine
            that went down while it was written, does not count: its trial runs again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        self.protocol: Protocol | None = None
        self.costs: dict[str, Any] = {}
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
        """The results in a file that no other process adds to meanwhile; a last line cut short is dropped.

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
        if "protocol" in row:
            self.protocol = Protocol(**{**row["protocol"], "base": Trial(**row["protocol"]["base"])})
        elif "costs" in row:
            self.costs = row["costs"]
        else:
            self.found[Trial(**row["trial"]).key] = row

    def agree(self, protocol: Protocol) -> None:
        """Makes ``protocol`` that of the file. Raises InputError if it has another."""
        if self.protocol is None:
            self.protocol = protocol
            self._write({"protocol": dataclasses.asdict(protocol)})
        elif self.protocol != protocol:
            here, asked = (dataclasses.asdict(one) for one in (self.protocol, protocol))
            here, asked = {**here.pop("base"), **here}, {**asked.pop("base"), **asked}
            differences = [f"{key} {here[key]!r}, not {value!r}" for key, value in asked.items() if here[key] != value]
            raise InputError(
                f"{self.path} holds results of another protocol: {', '.join(differences)}; give another --results"
            )

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self.found

    def score(self, trial: Trial, name: str = "MAP@R") -> float:
        """A score of a trial in the file. A run that failed scores 0."""
        return float(self.found[trial.key]["scores"].get(name, 0.0))

    def add(self, trial: Trial, row: dict[str, Any]) -> None:
        self._write({"trial": dataclasses.asdict(trial), **row})

    def add_costs(self, costs: dict[str, Any]) -> None:
        self._write({"costs": costs})

    def _write(self, row: dict[str, Any]) -> None:
        assert self.file is not None, "only results that are opened can be added to"
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self._take(row)

    def trials(self) -> list[Trial]:
        return [Trial(**row["trial"]) for row in self.found.values()]


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


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where the runs take place.

    Attributes:
        device: of torch.
        workers: runs at once, each in a process of its own.
        threads: of torch in each of them; sums depend on it in their last bits.
    """

    device: str
    workers: int
    threads: int

    def __str__(self) -> str:
        where = torch.cuda.get_device_name() if self.device == "cuda" else f"{platform.machine()} CPU"
        return (
            f"{where}, {self.threads} threads per run, Python {platform.python_version()}, torch {torch.__version__}, "
            f"pytorch-metric-learning {pytorch_metric_learning.__version__}"
        )


def run_all(trials: Iterable[Trial], data: Data, results: Results, machine: Machine, title: str) -> None:
    """Runs the trials whose results are not there yet, and adds each as it ends.

    A run whose loss stops being finite is a result too: it scores 0, and its line says why.
    """
    missing = [trial for key, trial in {trial.key: trial for trial in trials}.items() if key not in results.found]
    if not missing:
        return
    with tqdm(total=sum(trial.epochs for trial in missing), desc=title, unit="epoch", smoothing=0.05) as bar:
        side_by_side = machine.workers > 1 and len(missing) > 1
        ended = (_side_by_side if side_by_side else _in_turn)(missing, data, machine, bar)
        for left, (trial, row) in zip(range(len(missing) - 1, -1, -1), ended, strict=True):
            results.add(trial, {**row, "machine": str(machine)})
            bar.set_postfix_str(f"{left} runs left")


Ended = Iterator[tuple[Trial, dict[str, Any]]]


def _in_turn(trials: Sequence[Trial], data: Data, machine: Machine, bar: Any) -> Ended:
    torch.set_num_threads(machine.threads)
    for trial in trials:
        yield trial, _run(trial, data, machine.device, bar.update)


def _side_by_side(trials: Sequence[Trial], data: Data, machine: Machine, bar: Any) -> Ended:
    """As many at once as the machine is to have, each in a process that runs one after the other."""
    context = clean_processes(__name__)
    epochs = context.Value("q", 0)
    workers = min(machine.workers, len(trials))
    pool = ProcessPoolExecutor(workers, context, _start, (data, machine.device, machine.threads, epochs))
    try:
        # Only as many are handed over as run: none begins when the user interrupts.
        waiting = list(reversed(trials))
        running: dict[Future[dict[str, Any]], Trial] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                trial = waiting.pop()
                running[pool.submit(_run_in_worker, trial)] = trial
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            bar.update(epochs.value - bar.n)
            for future in done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise InputError(
            f"one of {workers} processes was killed, most likely for memory; "
            "the same command with fewer --workers goes on where it was"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run(trial: Trial, data: Data, device: str, advance: Callable[[], Any]) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        row: dict[str, Any] = {"scores": run(trial, data, device, advance)}
    except FloatingPointError as error:
        row = {"scores": {}, "failure": str(error)}
    return {**row, "seconds": time.monotonic() - begun}


_worker: dict[str, Any] = {}


def _start(data: Data, device: str, threads: int, epochs: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    tqdm.set_lock(threading.RLock())  # the default, shared by processes, is leaked by one that is ended
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _worker.update(data=data, device=device, epochs=epochs)


def _run_in_worker(trial: Trial) -> dict[str, Any]:
    return _run(trial, _worker["data"], _worker["device"], _advance)


def _end_with_parent() -> None:
    """For a parent that is killed, and has no chance to end its processes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _advance() -> None:
    with _worker["epochs"].get_lock():
        _worker["epochs"].value += 1
