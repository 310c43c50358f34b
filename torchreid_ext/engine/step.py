"""A training step from top to bottom: the batch, the output of the network, the losses, and the optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torchreid
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pml_drsl.checks import InputError
from pml_drsl.large_batch import forward_in_chunks
from torchreid_ext.checkpoint import states
from torchreid_ext.checkpoint.folder import RunCheckpoints
from torchreid_ext.engine.options import RunOptions
from torchreid_ext.runtime import distributed

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Batch(NamedTuple):
    """A training batch, or one process's share of it.

    Attributes:
        images: what the network takes, shape (N, C, H, W).
        pids: identity of each image, shape (N,), integer.
        camids: camera of each image, shape (N,), integer; None if the loader does not give the cameras.
    """

    images: Tensor
    pids: Tensor
    camids: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        camids = None if self.camids is None else self.camids.to(device, non_blocking=True)
        return Batch(self.images.to(device, non_blocking=True), self.pids.to(device, non_blocking=True), camids)


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

    def images_in_batches(self) -> set[int]:
        """The numbers of images in this process's share of a batch, as far as they are known before training."""
        loader = self.datamanager.train_loader
        if loader.batch_size is None:
            return set()
        samples = {loader.batch_size // distributed.size()}
        if not loader.drop_last:
            samples.add(len(loader.sampler) % loader.batch_size)
        return {number * int(getattr(loader.dataset, "k_tfm", 1)) for number in samples}

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


class Stepper:
    """Runs the network in the precision of ``amp``, and steps the optimizers, in every process of a run alike.

    The network's outputs leave it in float32 (float64 stays), so that the loss is never in half precision. The
    network, and every parameter of the optimizers besides, gets the mean of the processes' gradients.

    Args:
        amp: ``"off"``, ``"bf16"`` or ``"fp16"``; with ``"fp16"`` gradients are scaled.
        compiled: compile the network for training, with ``torch.compile``.
        device_type: of the network, ``"cpu"`` or ``"cuda"``.
        chunk_size: largest number of images that the network takes at a time, with the gradients of the whole batch, as
            ``pml_drsl.LargeBatch`` explains; 0 gives the network the whole batch.

    Attributes:
        scaler: of the gradients; it does nothing but for ``"fp16"``.

    Raises:
        InputError: for another ``amp``.
    """

    def __init__(self, amp: str = "off", compiled: bool = False, device_type: str = "cpu", chunk_size: int = 0) -> None:
        if amp not in AMP:
            raise InputError(f"train.amp must be one of {', '.join(AMP)}, got {amp!r}")
        self.dtype = AMP[amp]
        self.scaler = torch.amp.GradScaler(device_type, enabled=amp == "fp16")
        self._compiled, self._chunk_size = compiled, chunk_size
        # Each with which of its parameters trained when it was made.
        self._networks: dict[nn.Module, tuple[list[bool], Any]] = {}

    def forward(self, model: nn.Module, images: Tensor) -> Any:
        """The network's training output, tensors or nested tuples, lists and dictionaries of them."""
        network = self._network(model)
        precision = nullcontext() if self.dtype is None else torch.autocast(images.device.type, self.dtype)
        with precision:
            output = forward_in_chunks(network, images, self._chunk_size) if self._chunk_size else network(images)
        return output if self.dtype is None else _in_float32(output)

    def _network(self, model: nn.Module) -> Any:
        # The module itself stays as it is: evaluation, with batches of other sizes, would be compiled time and again,
        # and checkpoints would name its weights otherwise.
        trained = [parameter.requires_grad for parameter in model.parameters()]
        if model in self._networks and self._networks[model][0] == trained:
            return self._networks[model][1]
        # The hooks of an earlier DistributedDataParallel go with it.
        self._networks.pop(model, None)
        network: Any = torch.compile(model) if self._compiled else model
        if distributed.size() > 1:
            # What the loss leaves out (logits without a cross-entropy, say) gets no gradient, as in one process.
            # Statistics are averaged once an epoch; of the option's two names, new releases of torch warn of the old.
            names = inspect.signature(DistributedDataParallel).parameters
            option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
            options: dict[str, Any] = {option: False, "find_unused_parameters": True}
            network = DistributedDataParallel(network, **options)
        self._networks[model] = trained, network
        return network

    def step(self, loss: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Back-propagates a loss and steps the optimizers; those that no gradient reached stay as they are."""
        optimizers = list(optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        in_networks = {id(parameter) for model in self._networks for parameter in model.parameters()}
        every = {id(p): p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        distributed.average_gradients(p for key, p in every.items() if key not in in_networks)
        for optimizer in optimizers:
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                self.scaler.step(optimizer)
        self.scaler.update()


def _in_float32(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, dict):
        return {key: _in_float32(value) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return type(output)(_in_float32(value) for value in output)
    return output


def views_as_images(images: Tensor | Sequence[Tensor]) -> Tensor:
    """The augmented views of a batch as images: view 0 of the first image, view 1 of the first image, and so on.

    The views of an image stay together. The batches of all processes, one after the other, then have the order that
    the batch of one process has, which matters to a cross-batch memory.

    Args:
        images: the images, shape (N, C, H, W); with torchreid's ``k_tfm`` above 1, a list of k such tensors.

    Returns:
        All views, shape (k * N, C, H, W).
    """
    if isinstance(images, Tensor):
        return images
    return torch.stack(list(images), dim=1).flatten(0, 1)


def for_each_view(labels: Tensor, images: Tensor | Sequence[Tensor]) -> Tensor:
    """The labels of a batch, shape (N,), repeated for the views that ``views_as_images`` returns, shape (k * N,)."""
    return labels if isinstance(images, Tensor) else labels.repeat_interleave(len(images))


def cross_camera_pairs(pids: Tensor, camids: Tensor, mined: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """The pairs of a batch, without the pairs of one identity and one camera.

    Args:
        pids: identities, shape (N,), integer.
        camids: cameras, shape (N,), integer.
        mined: the choice of a miner, pairs (a1, p, a2, n) or triplets (a, p, n) of indices below N; None for all pairs.

    Returns:
        Pairs (a1, p, a2, n), or triplets if the miner chose triplets. Each positive has another camera than its anchor.
        All negatives stay, because a negative has another identity than its anchor.
    """
    if mined is None:
        same = pids[:, None] == pids
        positive = same & (camids[:, None] != camids)
        return (*positive.nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))
    a, p, *negatives = mined
    kept = camids[a] != camids[p]
    return (a[kept], p[kept], *(negatives if len(mined) == 4 else [negatives[0][kept]]))
