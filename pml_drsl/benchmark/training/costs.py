"""Time and peak memory of a training step with each loss, network included."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, cycle
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from pml_drsl.benchmark.timing.measure import cuda_peak_bytes, take_turns
from pml_drsl.benchmark.training.candidates import defaults
from pml_drsl.benchmark.training.images import TEST
from pml_drsl.benchmark.training.results import Results
from pml_drsl.benchmark.training.runner import Machine
from pml_drsl.benchmark.training.sets import BenchmarkSet
from pml_drsl.benchmark.training.trial import Trainer, Trial

SECONDS_OF_TURNS = 1.5


def measure(of_set: BenchmarkSet, losses: Sequence[str], results: Results, machine: Machine) -> None:
    """Adds the costs of the losses on a set to the file, each with its defaults, unless the file has them.

    Times are medians of steps made in turns, in one process, so that their ratios do not depend on what else the
    machine does. For the same reason, losses whose costs the file has are measured again beside new ones.
    """
    known = results.costs.get(of_set.name, {})
    if set(known) >= set(losses):
        return
    losses = list(dict.fromkeys([*known, *losses]))
    torch.set_num_threads(machine.threads)
    steps = {}
    train = of_set.data.split(TEST)[0]
    for loss in losses:
        trial = Trial(of_set.name, TEST, loss, defaults(loss), changes={"epochs": 1})
        trainer = Trainer(trial, of_set, train, machine.device)
        trainer.network.train()
        steps[loss] = _stepper(trainer)
    print(f"costs on {of_set.name}: about {SECONDS_OF_TURNS * len(steps):.0f} s of steps in turns", file=sys.stderr)
    times = take_turns(steps, SECONDS_OF_TURNS * len(steps), machine.device)
    found = {
        loss: {"seconds": median(times[loss]), "peak_bytes": peak_bytes(step, machine.device)}
        for loss, step in tqdm(steps.items(), "memory", unit="step")
    }
    results.add_costs(of_set.name, found)


def _stepper(trainer: Trainer) -> Callable[[], None]:
    batches = cycle(trainer.batches[0])
    return lambda: trainer.step(next(batches))


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """The most memory that the tensors of a step take at once, beyond what is there before the step.

    Torch's allocators count it: the memory that the process takes from the system would not show a step that fits in
    memory freed before.
    """
    if device != "cpu":
        return cuda_peak_bytes(step)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports each of its starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    # The averages over operators have no peak: it takes every allocation, in order.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    taken: Iterable[int] = (event.nbytes() for event in events)
    return max(accumulate(taken, initial=0))
