"""The log of a training epoch: lines of text, a progress bar on a terminal, and the scalars of TensorBoard."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torchreid
from tqdm import tqdm

from torchreid_ext.runtime import distributed


class EpochLog:
    """The log of one epoch.

    Args:
        epoch: number of the epoch, from 0.
        max_epoch: number of epochs of the run.
        num_batches: number of batches of the epoch.
        print_freq: number of batches between two lines, >= 1. The last batch of an epoch always has a line.
        writer: TensorBoard's ``SummaryWriter``, or None.
    """

    def __init__(self, epoch: int, max_epoch: int, num_batches: int, print_freq: int, writer: Any) -> None:
        self.epoch, self.max_epoch, self.num_batches = epoch, max_epoch, num_batches
        self.print_freq, self.writer = print_freq, writer
        self.meters = torchreid.utils.MetricMeter()
        self.time, self.data = torchreid.utils.AverageMeter(), torchreid.utils.AverageMeter()
        self._taken = self._printed = 0

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader. Their time is measured, and a terminal shows a progress bar with the time left.

        Only the first process shows a progress bar, and only if stderr is a terminal.
        """
        # None lets tqdm look whether stderr is a terminal.
        disable = None if distributed.is_first() else True
        title = f"epoch {self.epoch + 1}/{self.max_epoch}"
        with tqdm(total=self.num_batches, desc=title, leave=False, disable=disable) as bar:
            self._started = time.perf_counter()
            for batch in loader:
                self._taken += 1
                self.data.update(time.perf_counter() - self._started)
                yield batch
                bar.update()
                self._started = time.perf_counter()

    def add(self, batch_index: int, summary: dict[str, float], lr: float) -> None:
        """Logs the step on the latest batch of ``batches``.

        Args:
            batch_index: number of the batch in the epoch, from 0.
            summary: values by name.
            lr: the learning rate.
        """
        self.time.update(time.perf_counter() - self._started)
        self.meters.update(summary)
        if self.writer is not None:
            step = self.epoch * self.num_batches + batch_index
            values = {**summary, "lr": lr, "time": self.time.val, "data": self.data.val}
            for name, value in values.items():
                self.writer.add_scalar(f"Train/{name}", value, step)
        if (batch_index + 1) % self.print_freq == 0:
            self._print(lr)

    def finish(self, lr: float) -> None:
        """Prints the line of the last batch of the epoch, unless it is printed already."""
        if self._printed < self._taken:
            self._print(lr)

    def _print(self, lr: float) -> None:
        self._printed = self._taken
        with tqdm.external_write_mode():
            print(self._line(self._taken, lr), flush=True)

    def _line(self, done: int, lr: float) -> str:
        left = self.num_batches - done + (self.max_epoch - self.epoch - 1) * self.num_batches
        parts = [
            f"epoch: [{self.epoch + 1}/{self.max_epoch}][{done}/{self.num_batches}]",
            f"time {self.time.val:.3f} ({self.time.avg:.3f})",
            f"data {self.data.val:.3f} ({self.data.avg:.3f})",
            f"eta {datetime.timedelta(seconds=int(self.time.avg * left))}",
            str(self.meters),
            f"lr {lr:.6f}",
        ]
        return "\t".join(parts)
