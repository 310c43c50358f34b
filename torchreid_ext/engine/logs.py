"""What a training epoch tells people: torchreid's line, a progress bar on a terminal, and TensorBoard's scalars."""

from __future__ import annotations

import datetime
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from torchreid_ext.runtime import distributed


class Meter:
    """The last value of a quantity and its average."""

    def __init__(self) -> None:
        self.last, self.sum, self.count = 0.0, 0.0, 0

    @property
    def average(self) -> float:
        return self.sum / max(1, self.count)

    def update(self, value: float) -> None:
        self.last, self.sum, self.count = value, self.sum + value, self.count + 1


class EpochLog:
    """The log of one epoch.

    Args:
        epoch: from 0.
        max_epoch: epochs of the run.
        num_batches: batches of the epoch.
        print_freq: batches between two lines, >= 1.
        writer: TensorBoard's ``SummaryWriter``, or None.
    """

    def __init__(self, epoch: int, max_epoch: int, num_batches: int, print_freq: int, writer: Any) -> None:
        self.epoch, self.max_epoch, self.num_batches = epoch, max_epoch, num_batches
        self.print_freq, self.writer = print_freq, writer
        self.meters: dict[str, Meter] = defaultdict(Meter)
        self.time, self.data = Meter(), Meter()

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader, timed, with a progress bar where stderr is a terminal and none in a file."""
        disable = None if distributed.is_first() else True
        with tqdm(
            total=self.num_batches, desc=f"epoch {self.epoch + 1}/{self.max_epoch}", leave=False, disable=disable
        ) as bar:
            self._started = time.perf_counter()
            for batch in loader:
                self.data.update(time.perf_counter() - self._started)
                yield batch
                bar.update()
                self._started = time.perf_counter()

    def add(self, batch_index: int, summary: dict[str, float], lr: float) -> None:
        """Logs the batch that ``batches`` gave last."""
        self.time.update(time.perf_counter() - self._started)
        for name, value in summary.items():
            self.meters[name].update(value)
        if self.writer is not None:
            step = self.epoch * self.num_batches + batch_index
            values = {**summary, "lr": lr, "time": self.time.last, "data": self.data.last}
            for name, value in values.items():
                self.writer.add_scalar(f"Train/{name}", value, step)
        if (batch_index + 1) % self.print_freq == 0:
            with tqdm.external_write_mode():
                print(self._line(batch_index + 1, lr), flush=True)

    def _line(self, done: int, lr: float) -> str:
        left = self.num_batches - done + (self.max_epoch - self.epoch - 1) * self.num_batches
        parts = [
            f"epoch: [{self.epoch + 1}/{self.max_epoch}][{done}/{self.num_batches}]",
            f"time {self.time.last:.3f} ({self.time.average:.3f})",
            f"data {self.data.last:.3f} ({self.data.average:.3f})",
            f"eta {datetime.timedelta(seconds=int(self.time.average * left))}",
            *(f"{name} {meter.last:.4f} ({meter.average:.4f})" for name, meter in self.meters.items()),
            f"lr {lr:.6f}",
        ]
        return "\t".join(parts)
