"""What an epoch needs beside its steps: which layers train, and the log."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torchreid
from torch import nn
from tqdm import tqdm

from pml_drsl.checks import InputError
from torchreid_ext.runtime import distributed


class Layers:
    """Freezes and unfreezes the children of a network; parameters that the user froze before stay frozen. Children are
    given as torchreid's option ``open_layers``: one name, or a list of them."""

    def __init__(self, model: nn.Module) -> None:
        model = distributed.unwrapped(model)
        self._children = dict(model.named_children())
        self._frozen = {id(p) for p in model.parameters() if not p.requires_grad}

    def check(self, layers: str | list[str] | None, key: str) -> None:
        """Raises InputError, about a config key, if one of the names is not the name of a child."""
        if unknown := ", ".join(name for name in _names(layers) if name not in self._children):
            known = ", ".join(self._children)
            raise InputError(f"{key}: the model has no layer {unknown}; its layers are {known}")

    def open(self, layers: str | list[str] | None = None) -> None:
        """Lets only the named children train, or all; the others get no gradients and are in evaluation mode. Without
        names every layer keeps its mode, because a network may keep some in evaluation mode when it trains."""
        opened = self._children if layers is None else _names(layers)
        for name, child in self._children.items():
            if layers is not None:
                child.train(name in opened)
            for parameter in child.parameters():
                parameter.requires_grad = name in opened and id(parameter) not in self._frozen


def _names(layers: str | list[str] | None) -> list[str]:
    return [layers] if isinstance(layers, str) else layers or []


class EpochLog:
    """The log of one epoch: lines of text, a progress bar on a terminal, and the scalars of TensorBoard.

    The epoch is counted from 0. ``print_freq`` batches are between two lines, and the last batch always has a line.
    ``writer`` is TensorBoard's, or None.
    """

    def __init__(self, epoch: int, max_epoch: int, num_batches: int, print_freq: int, writer: Any) -> None:
        self.epoch, self.max_epoch, self.num_batches = epoch, max_epoch, num_batches
        self.print_freq, self.writer = print_freq, writer
        self.meters = torchreid.utils.MetricMeter()
        self.time, self.data = torchreid.utils.AverageMeter(), torchreid.utils.AverageMeter()

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader, whose time is measured; the first process shows a progress bar on a terminal."""
        # None lets tqdm look whether stderr is a terminal.
        disable = None if distributed.is_first() else True
        title = f"epoch {self.epoch + 1}/{self.max_epoch}"
        with tqdm(total=self.num_batches, desc=title, leave=False, disable=disable) as bar:
            self._started = time.perf_counter()
            for batch in loader:
                self.data.update(time.perf_counter() - self._started)
                yield batch
                bar.update()
                self._started = time.perf_counter()

    def add(self, batch_index: int, summary: dict[str, float], lr: float) -> None:
        """Logs the values of the step on the latest batch of ``batches``, whose number in the epoch is from 0."""
        self.time.update(time.perf_counter() - self._started)
        self.meters.update(summary)
        if self.writer is not None:
            step = self.epoch * self.num_batches + batch_index
            for name, value in {**summary, "lr": lr, "time": self.time.val, "data": self.data.val}.items():
                self.writer.add_scalar(f"Train/{name}", value, step)
        done = batch_index + 1
        if done % self.print_freq == 0 and done < self.num_batches:
            self.line(done, lr)

    def line(self, done: int, lr: float) -> None:
        """Prints the line of the first ``done`` batches; call it after the last batch, whose step may be left out."""
        left = (self.max_epoch - self.epoch) * self.num_batches - done
        parts = [
            f"epoch: [{self.epoch + 1}/{self.max_epoch}][{done}/{self.num_batches}]",
            f"time {self.time.val:.3f} ({self.time.avg:.3f})",
            f"data {self.data.val:.3f} ({self.data.avg:.3f})",
            f"eta {datetime.timedelta(seconds=int(self.time.avg * left))}",
            str(self.meters),
            f"lr {lr:.6f}",
        ]
        with tqdm.external_write_mode():
            print("\t".join(parts), flush=True)
