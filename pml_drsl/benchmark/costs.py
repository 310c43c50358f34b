"""Time and peak memory of a training step with each loss, network included."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from pml_drsl.benchmark.images import Data
from pml_drsl.benchmark.measure import clean_processes, peak_bytes, take_turns
from pml_drsl.benchmark.results import Machine, Results
from pml_drsl.benchmark.trial import Trainer, Trial

SECONDS_OF_TURNS = 1.5
STEPS_OF_PROBE = 5


def measure(trials: list[Trial], data: Data, results: Results, machine: Machine) -> None:
    """Adds the costs of trials to the file, unless it has those of the same trials.

    Times are medians of steps made in turns, in one process, so that their ratios do not depend on what else the
    machine does; memory is what the steps add to the peak of a process of its own.
    """
    trials = list({trial.key: trial.but(seed=0, epochs=1) for trial in trials}.values())
    if set(results.costs) >= {trial.key for trial in trials}:
        return
    torch.set_num_threads(machine.threads)
    steps = {}
    for trial in trials:
        trainer = Trainer(trial, data.split(trial.split)[0], machine.device)
        trainer.network.train()
        steps[trial.key] = _stepper(trainer)
    times = take_turns(steps, SECONDS_OF_TURNS * len(steps), machine.device)
    costs = {}
    for trial in tqdm(trials, "memory", unit="loss"):
        with ProcessPoolExecutor(1, clean_processes(__name__)) as pool:
            peak = pool.submit(_peak, trial, data, machine.device, machine.threads).result()
        costs[trial.key] = {"seconds": median(times[trial.key]), "peak_bytes": peak}
    results.add_costs(costs)


def _stepper(trainer: Trainer) -> Any:
    batches = cycle(trainer.batches[0])
    return lambda: trainer.step(next(batches))


def _peak(trial: Trial, data: Data, device: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    train = data.split(trial.split)[0]
    Trainer(trial.but(identities=2, instances=2, memory=0), train, device).epoch(
        0, 1
    )  # libraries allocate at first use
    before = peak_bytes(device)
    trainer = Trainer(trial, train, device)
    trainer.epoch(0, STEPS_OF_PROBE)
    after = peak_bytes(device)
    return None if before is None or after is None else after - before
