"""One training step of an engine: the batch, the output of the network, the losses, and the optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchreid
from torch import Tensor

from torchreid_ext.checkpoint import states
from torchreid_ext.engine.batch import Batch, for_each_view, views_as_images
from torchreid_ext.engine.options import RunOptions
from torchreid_ext.engine.saving import RunCheckpoints
from torchreid_ext.engine.stepper import Stepper
from torchreid_ext.runtime import distributed


class TrainingStep(torchreid.engine.Engine):
    """The part of an engine that takes training steps; see ``BaseEngine``.

    A step has four parts, each a method: ``training_batch`` reads the batch, ``forward`` gives the output of the
    network, ``compute_losses`` (of each engine) gives the loss, and ``step`` steps the optimizers.
    """

    options: RunOptions
    stepper: Stepper
    skipped: int
    _checkpoints: RunCheckpoints | None
    _put_back: Callable[[], None]

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        """Takes one training step on a batch of the loader, and returns the values to log by name."""
        batch = self.training_batch(data)
        loss, summary = self.compute_losses(self.forward(batch.images), batch)
        self.step(loss)
        return summary

    def training_batch(self, data: dict[str, Any]) -> Batch:
        """The images, identities and cameras of a batch of the loader, on the model's device."""
        images, pids = self.parse_data_for_train(data)
        camids = self.parse_cameras(data) if "camid" in data else None
        return Batch(images, pids, camids).to(self.device)

    def parse_data_for_train(self, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The images and identities of a batch of the loader; every augmented view is an image of its own."""
        return views_as_images(data["img"]), for_each_view(data["pid"], data["img"])

    def parse_cameras(self, data: dict[str, Any]) -> Tensor:
        """The camera of each of the images, shape (N,)."""
        return for_each_view(data["camid"], data["img"])

    def forward(self, images: Tensor) -> Any:
        """What the model returns in training; ``amp`` sets the precision inside, and the output is in float32."""
        if self.options.skip_nonfinite:
            self._put_back = states.keep_buffers([self.model, *states.losses_of(self).values()])
        return self.stepper.forward(self.model, images)

    def compute_losses(self, output: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, a scalar, and the values to log by name.

        Args:
            output: what ``forward`` returned for ``batch.images``.
            batch: this process's share of the batch.
        """
        raise NotImplementedError

    def local_mean_scale(self, pids: Tensor) -> float:
        """The factor that makes the mean over the processes of a local mean equal to the mean over all samples."""
        return 1.0

    def step(self, loss: Tensor) -> None:
        """Steps the optimizers of every registered model on a loss; several processes step on the mean of their losses.

        Raises:
            FloatingPointError: if the loss is not finite, unless ``skip_nonfinite`` is set.
        """
        value = distributed.mean(loss)
        if self.options.skip_nonfinite and not torch.isfinite(value):
            self._put_back()
            self.skipped += 1
            print(f"Skipped epoch {self.epoch + 1}, batch {self.batch_idx + 1}: the loss is {value.item()}")
            return
        self.check_finite(value)
        self.stepper.step(loss, [optimizer for optimizer in self._optims.values() if optimizer is not None])

    def check_finite(self, loss: Tensor) -> None:
        """Raises FloatingPointError for a loss that is NaN or infinite, before the loss reaches the weights."""
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} in epoch {self.epoch + 1}, batch {self.batch_idx + 1}: "
                f"try a smaller learning rate, now {self.get_current_lr()}{self._last_good()}"
            )

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def _last_good(self) -> str:
        return self._checkpoints.last_good() if self._checkpoints else "; no checkpoint was saved"
