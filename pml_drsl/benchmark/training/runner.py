"""Runs trials, in several processes, and adds their results to a file as each ends."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import pytorch_metric_learning
import torch
from tqdm import tqdm

from pml_drsl.benchmark.timing.measure import clean_processes
from pml_drsl.benchmark.training.candidates import CROSS_ENTROPY
from pml_drsl.benchmark.training.images import TEST
from pml_drsl.benchmark.training.results import Results
from pml_drsl.benchmark.training.sets import BenchmarkSet
from pml_drsl.benchmark.training.trial import Trainer, Trial, run
from pml_drsl.checks import InputError


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


Sets = Mapping[str, BenchmarkSet]
Ended = Iterator[tuple[Trial, dict[str, Any]]]
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}"


def run_all(trials: Iterable[Trial], sets: Sets, results: Results, machine: Machine, title: str) -> None:
    """Runs the trials whose results are not there yet, in their order, and adds each as it ends.

    A run whose loss stops being finite is a result too: it scores 0, and its line says why.
    """
    missing = [trial for key, trial in {trial.key: trial for trial in trials}.items() if key not in results.found]
    if not missing:
        return
    torch.set_num_threads(machine.threads)
    per_image = {name: _seconds_per_image(sets[name], machine) for name in {trial.set for trial in missing}}
    weights = {trial.key: per_image[trial.set] * _images_per_epoch(trial, sets) for trial in missing}
    total = sum(_epochs(trial, sets) * weights[trial.key] for trial in missing)
    # A log is no terminal: a line a minute is enough there.
    interval = 0.1 if sys.stderr.isatty() else 60.0
    with tqdm(total=total, desc=title, bar_format=BAR, smoothing=0.02, mininterval=interval) as bar:
        side_by_side = machine.workers > 1 and len(missing) > 1
        ended = (_side_by_side if side_by_side else _in_turn)(missing, weights, sets, machine, bar)
        for left, (trial, row) in zip(range(len(missing) - 1, -1, -1), ended, strict=True):
            results.add(trial, {**row, "machine": str(machine)})
            bar.set_postfix_str(f"{left} of {len(missing)} runs left")


def _epochs(trial: Trial, sets: Sets) -> int:
    return sets[trial.set].recipe.but(**trial.changes).epochs


def _images_per_epoch(trial: Trial, sets: Sets) -> int:
    return len(sets[trial.set].data.split(trial.split, trial.seed)[0])


def _seconds_per_image(of_set: BenchmarkSet, machine: Machine) -> float:
    """Time to train on an image of the set: what tells how much of all runs is done."""
    trial = Trial(of_set.name, TEST, CROSS_ENTROPY, changes={"epochs": 1})
    trainer = Trainer(trial, of_set, of_set.data.split(TEST)[0], machine.device)
    trainer.epoch(0, steps=1)
    begun = time.perf_counter()
    trainer.epoch(0, steps=1)
    return (time.perf_counter() - begun) / len(trainer.batches[0][0])


def _in_turn(trials: Sequence[Trial], weights: Mapping[str, float], sets: Sets, machine: Machine, bar: Any) -> Ended:
    for trial in trials:
        yield trial, _run(trial, sets, machine.device, partial(_update, bar, weights[trial.key]))


def _update(bar: Any, seconds: float) -> None:
    bar.update(max(0.0, min(seconds, bar.total - bar.n)))  # the total is an estimate, and sums are rounded


def _side_by_side(
    trials: Sequence[Trial], weights: Mapping[str, float], sets: Sets, machine: Machine, bar: Any
) -> Ended:
    """Trains in several processes at once, each of which makes one run after the other."""
    context = clean_processes(__name__)
    done_of_all = context.Value("d", 0.0)
    workers = min(machine.workers, len(trials))
    pool = ProcessPoolExecutor(workers, context, _start, (dict(sets), machine.device, machine.threads, done_of_all))
    try:
        # Only as many are handed over as run: none begins when the user interrupts.
        waiting = list(reversed(trials))
        running: dict[Future[dict[str, Any]], Trial] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                trial = waiting.pop()
                running[pool.submit(_run_in_worker, trial, weights[trial.key])] = trial
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            _update(bar, done_of_all.value - bar.n)
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


def _run(trial: Trial, sets: Sets, device: str, advance: Callable[[], Any]) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        row = run(trial, sets[trial.set], device, advance)
    except FloatingPointError as error:
        row = {"scores": {}, "failure": str(error)}
    return {**row, "seconds": round(time.monotonic() - begun, 1)}


_worker: dict[str, Any] = {}


def _start(sets: Sets, device: str, threads: int, done_of_all: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    tqdm.set_lock(threading.RLock())  # the default, shared by processes, is leaked by one that is ended
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _worker.update(sets=sets, device=device, done_of_all=done_of_all)


def _run_in_worker(trial: Trial, weight: float) -> dict[str, Any]:
    return _run(trial, _worker["sets"], _worker["device"], partial(_advance, weight))


def _end_with_parent() -> None:
    """For a parent that is killed, and has no chance to end its processes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _advance(weight: float) -> None:
    with _worker["done_of_all"].get_lock():
        _worker["done_of_all"].value += weight
