"""``drsl-benchmark speed --step --chunk``: compares a training step in chunks with one of the whole batch at once.

Both steps embed the images with a network of torchreid, compute ``DRSLoss()`` and its gradient, and run the optimizer.
The plain step embeds the whole batch at once. The step in chunks uses ``LargeBatch``: it needs the memory of one chunk,
and a second forward pass. Memory is measured in a separate process for each step. It is what one step adds to the
network and the images. Times are compared for each image.

On the CPU, times include the work of the system to hand out memory. glibc gives the memory of large tensors back when
they are freed, so that a plain step pays for its memory every time. A step in chunks hardly does. Where a plain step
takes gigabytes, it can therefore be slower than a step in chunks, in spite of the second forward pass.

With the two variables below in the environment, glibc keeps the memory, and every step after the first one is faster.
``--seconds`` must then be longer than a step, because a step that is measured once is the first one. The memory figures
are then larger: take them from a run without the variables.

  MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 drsl-benchmark speed --step osnet_x1_0 --chunk 16 --seconds 25
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pml_drsl.benchmark.timing import measure
from pml_drsl.benchmark.timing import step as speed_step
from pml_drsl.benchmark.timing import table as speed_report
from pml_drsl.benchmark.timing.measure import PER_IDENTITY
from pml_drsl.large_batch import LargeBatch
from pml_drsl.losses import DRSLoss

PLAIN = 0


@dataclass(frozen=True)
class Row:
    """One training step of a network with DRSL.

    Attributes:
        network: name of a torchreid network.
        size: number of images in the batch.
        chunk: largest number of images that the network embeds at once, or 0 for the plain step, which embeds all.
        seconds: median time of the step, or None where the step does not fit in memory.
        image_seconds: the time divided by the number of images, or None.
        ratio: ``image_seconds`` divided by ``image_seconds`` of the plain step, median over the rounds where both took
            turns; None where no plain step fits in memory.
        plain_size: number of images of the plain step in the ratio: the same number, or the largest number that fits in
            memory; None without a ratio.
        peak_bytes: memory that the step adds to the network and the images, or None where it was not measured.
        rounds: number of measured rounds.
        note: what a reader must know about the figures, or "".
    """

    network: str
    size: int
    chunk: int
    seconds: float | None
    image_seconds: float | None
    ratio: float | None
    plain_size: int | None
    peak_bytes: int | None
    rounds: int
    note: str = ""


class Features(nn.Module):
    """A network of torchreid that returns its features alone, which is what a loss takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)[1]
        return features


def run(
    network: str, chunk: int, sizes: Sequence[int], seconds: float, memory: float, threads: int, device: str
) -> list[Row]:
    """Measures, and prints two lines for each size, from the smallest size to the largest.

    Args:
        network: name of a network of torchreid.
        chunk: largest number of images in a chunk, >= 1.
        sizes: numbers of images in a batch.
        seconds: time for the rounds of each size. Steps that take longer are measured once.
        memory: GiB that one step may take.
        threads: number of torch's threads.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        ModuleNotFoundError: if torchreid is not installed.
        InputError: if torchreid has no such network.
    """
    speed_step.build(network, "cpu")  # A wrong name ends the command before the work.
    shape = (speed_step.HEIGHT, speed_step.WIDTH)
    makers = {way: partial(make_step, network, way, shape, device) for way in (PLAIN, chunk)}
    print(f"{speed_report.machine(device, threads)}\n{network} and DRSL, {shape[0]} x {shape[1]} pixels")
    print(f"whole: the plain step, with the whole batch at once. chunks: LargeBatch, at most {chunk} images at once.")
    print("/ whole: the time for each image, divided by the time for each image of the plain step.\n")
    print(f"{'images':>8}{'batch':>8}{'time':>12}{'per image':>12}{'/ whole':>10}{'memory':>12}")
    rows: list[Row] = []
    fitting: tuple[int, float] | None = None
    for size in tqdm(sorted(set(sizes)), desc="chunks", unit="size"):
        probes = {way: measure.probe(make, size, device, threads, memory, None) for way, make in makers.items()}
        times = _times(makers, probes, size, seconds, device)
        if PLAIN in times:
            fitting = size, median(times[PLAIN]) / size
        for way, found in probes.items():
            rows.append(_row(network, size, way, found, times, fitting))
            tqdm.write(_line(rows[-1]))
    return rows


def make_step(network: str, chunk: int, shape: tuple[int, int], device: str, size: int) -> Callable[[], None]:
    """A function that takes one training step.

    Args:
        network: name of a network of torchreid.
        chunk: largest number of images that the network embeds at once, or 0 for all images.
        shape: height and width of the images in pixels.
        device: ``"cpu"`` or ``"cuda"``.
        size: number of images in the batch, a multiple of 4.
    """
    model, optimizer = speed_step.build(network, device)
    images = torch.randn(size, 3, *shape, device=device)
    labels = torch.arange(size, device=device) // PER_IDENTITY
    features, loss_fn = Features(model), DRSLoss()
    in_chunks = LargeBatch(features, loss_fn, chunk) if chunk else None

    def step() -> None:
        optimizer.zero_grad()
        loss = in_chunks(images, labels) if in_chunks else loss_fn(features(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _times(
    makers: Mapping[int, Callable[[int], Callable[[], None]]],
    probes: Mapping[int, measure.Probe],
    size: int,
    seconds: float,
    device: str,
) -> dict[int, list[float]]:
    """The times of the steps that fit in memory, by the largest number of images at once.

    The steps take turns, unless one of them takes longer than ``seconds``. Then there is one time of each step.
    """
    cold = {way: found.seconds for way, found in probes.items() if found.seconds is not None}
    if cold and max(cold.values()) <= seconds:
        return measure.take_turns({way: makers[way](size) for way in cold}, seconds, device)
    return {way: [took] for way, took in cold.items()}


def _row(
    network: str,
    size: int,
    chunk: int,
    found: measure.Probe,
    times: Mapping[int, Sequence[float]],
    fitting: tuple[int, float] | None,
) -> Row:
    """The row of one step.

    Args:
        network: name of the network.
        size: number of images in the batch.
        chunk: largest number of images at once, or 0.
        found: what the separate process measured.
        times: the times of the steps of this size, by ``chunk``.
        fitting: number of images of the largest plain step that fits in memory, and its time for each image.
    """
    if chunk not in times:
        return Row(network, size, chunk, None, None, None, None, None, 0, found.failure or "")
    own, ratio, plain_size, notes = times[chunk], None, None, []
    if PLAIN in times:
        # A ratio for each round, because other work on the machine slows both times of a round.
        ratio, plain_size = median(mine / whole for mine, whole in zip(own, times[PLAIN], strict=True)), size
    elif fitting is not None:
        plain_size, image_seconds = fitting
        ratio = median(own) / size / image_seconds
        notes.append(f"/ whole: against {plain_size} images, the most that fit")
    if len(own) == 1:
        notes.append("timed once, cold")
    note = "; ".join(notes)
    return Row(network, size, chunk, median(own), median(own) / size, ratio, plain_size, found.peak, len(own), note)


def _line(row: Row) -> str:
    time, image_time = speed_report.time_text(row.seconds), speed_report.time_text(row.image_seconds)
    ratio, memory = speed_report.ratio_text(row.ratio), speed_report.bytes_text(row.peak_bytes)
    batch = "chunks" if row.chunk else "whole"
    return f"{row.size:>8}{batch:>8}{time:>12}{image_time:>12}{ratio:>10}{memory:>12}  {row.note}".rstrip()
