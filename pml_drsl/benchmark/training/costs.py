"""Time and peak memory of a training step with each loss, network included."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from itertools import accumulate, cycle
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from pml_drsl.benchmark.timing.measure import cuda_peak_bytes, take_turns
from pml_drsl.benchmark.training.images import Data
from pml_drsl.benchmark.training.results import Machine, Results
from pml_drsl.benchmark.training.trial import Trainer, Trial

SECONDS_OF_TURNS = 1.5


def measure(trials: list[Trial], data: Data, results: Results, machine: Machine) -> None:
    """Adds the costs of trials to the file, unless it has those of the same trials.

    Times are medians of steps made in turns, in one process, so that their ratios do not depend on what else the
    machine does.
    """
    trials = list({trial.key: trial for trial in map(costed, trials)}.values())
    if set(results.costs) >= {trial.key for trial in trials}:
        return
    torch.set_num_threads(machine.threads)
    steps = {}
    for trial in trials:
        trainer = Trainer(trial, data.split(trial.split)[0], machine.device)
        trainer.network.train()
        steps[trial.key] = _stepper(trainer)
    print(f"costs: about {SECONDS_OF_TURNS * len(steps):.0f} s of steps in turns", file=sys.stderr)
    times = take_turns(steps, SECONDS_OF_TURNS * len(steps), machine.device)
    costs = {
        key: {"seconds": median(times[key]), "peak_bytes": peak_bytes(step, machine.device)}
        for key, step in tqdm(steps.items(), "memory", unit="step")
    }
    results.add_costs(costs)


def costed(trial: Trial) -> Trial:
    """The trial that stands for this one in the costs: neither the seed nor the number of epochs changes a step."""
    return trial.but(seed=0, epochs=1)


def _stepper(trainer: Trainer) -> Callable[[], None]:
    batches = cycle(trainer.batches[0])
    return lambda: trainer.step(next(batches))


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """The most that the tensors of a step take at once, beyond what is there before it.

    Counted by torch's allocators: what the process takes from the system hides a step that fits in memory freed before.
    """
    if device != "cpu":
        return cuda_peak_bytes(step)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler tells of its every start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    # The averages over operators have no peak: it takes every allocation, in order.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    taken: Iterable[int] = (event.nbytes() for event in events)
    return max(accumulate(taken, initial=0))
