"""The parts of ``drsl-benchmark gpu`` that measure speed: the loss alone, and the loss in a training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from statistics import median

import torch

from pml_drsl.benchmark.timing import measure
from pml_drsl.benchmark.timing import step as network_step
from pml_drsl.benchmark.timing.gpu_row import Row, Setting
from pml_drsl.benchmark.timing.measure import FLOOR
from pml_drsl.benchmark.timing.table import NAMES, bytes_text, time_text

LOSSES = ("DRSL", "DRSL-definition", "SupCon")
DIM = 512


def loss(setting: Setting) -> Iterator[Row]:
    """Forward and backward of the losses, in times of the distance matrix alone."""
    sizes = (64, 128) if setting.quick else (256, 512, 1024, 2048, 4096, 8192, 16384)
    for size in sizes:
        title = f"N = {size:,}, {DIM} dimensions"
        steps = _fitting_steps(size, setting.device)
        if FLOOR not in steps:
            yield Row(title, "the distance matrix does not fit in the GPU's memory")
            break
        times = measure.take_turns(steps, 0.05 if setting.quick else 2.0, setting.device)
        floor = time_text(median(times[FLOOR]))
        ratios = {
            name: f"{median(mine / base for mine, base in zip(times[name], times[FLOOR], strict=True)):.2f}"
            for name in LOSSES
            if name in times
        }
        yield Row(f"{title}: time / time of the distance matrix ({floor})", _listed(ratios))
        if setting.on_gpu:
            memory = {name: bytes_text(measure.cuda_peak_bytes(step)) for name, step in steps.items()}
            yield Row(f"{title}: memory (distance matrix {memory[FLOOR]})", _listed(memory))
    if setting.on_gpu:
        counts = {name: str(_waits(measure.make_step(name, 256, DIM, "cuda"))) for name in LOSSES}
        yield Row("N = 256: operations that make the CPU wait for the GPU", _listed(counts))


def _fitting_steps(size: int, device: str) -> dict[str, Callable[[], None]]:
    """The steps of the distance matrix and of the losses that fit in memory, after their first call."""
    steps: dict[str, Callable[[], None]] = {}
    for name in (FLOOR, *LOSSES):
        try:
            step = measure.make_step(name, size, DIM, device)
            step()  # The first call compiles kernels.
            steps[name] = step
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
    return steps


def _listed(figures: dict[str, str]) -> str:
    return ", ".join(f"{NAMES.get(name, name)} {figures.get(name, 'does not fit')}" for name in LOSSES)


def _waits(step: Callable[[], None]) -> int:
    """The number of operations in a step that make the CPU wait for the GPU, counted by torch's debug mode."""
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


def step(setting: Setting) -> Iterator[Row]:
    """The share of the loss in a training step of OSNet on images of 256 x 128 pixels."""
    network, sizes = ("osnet_x0_25", (8,)) if setting.quick else ("osnet_x1_0", (256, 128, 64))
    # A CPU takes minutes for float16.
    for half in (False, True) if setting.on_gpu else (False,):
        for size in sizes:
            what = f"{network}, {size} images, {'float16' if half else 'float32'}"
            try:
                rows = network_step.run(
                    network, [size], LOSSES[:2], 0.05 if setting.quick else 4.0, 1, setting.device, half=half
                )
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                yield Row(what, "does not fit in the GPU's memory")
                continue
            for row in rows:
                times = f"{time_text(row.seconds)} and {time_text(row.step_seconds)}"
                yield Row(
                    f"{what}: share of {NAMES[row.loss]} in the step", f"{row.share:.2%} (loss and network: {times})"
                )
            break
