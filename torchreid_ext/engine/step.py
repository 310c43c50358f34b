"""A training step from top to bottom: the batch, the output of the network, the losses, and the optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torchreid
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.data import default_collate

from pml_drsl.checks import InputError
from pml_drsl.large_batch import forward_in_chunks
from torchreid_ext.checkpoint import states
from torchreid_ext.checkpoint.folder import RunCheckpoints
from torchreid_ext.engine.options import RunOptions
from torchreid_ext.runtime import distributed

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
POOLING: dict[str, Callable[[Tensor], Tensor]] = {"avg": lambda frames: frames.mean(0), "max": lambda f: f.amax(0)}


class Batch(NamedTuple):
    """A training batch, or one process's share of it."""

    images: Tensor  # what the network takes, shape (N, C, H, W)
    pids: Tensor  # identity of each image, shape (N,), integer
    camids: Tensor | None  # camera of each image, likewise; None if the loader does not give the cameras


class TrainingStep(torchreid.engine.Engine):
    """The part of an engine that takes training steps, with a method for each part of a step; see ``BaseEngine``."""

    options: RunOptions
    stepper: Stepper
    stepped = False  # whether `step` was called
    skipped: int
    _checkpoints: RunCheckpoints
    _put_back: Callable[[], None] = staticmethod(lambda: None)

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        """Takes one training step on a batch of the loader, and returns the values to log by name."""
        batch = self.training_batch(data)
        loss, summary = self.compute_losses(self.forward(batch.images), batch)
        self.step(loss)
        return summary

    def training_batch(self, data: dict[str, Any]) -> Batch:
        """The images, identities and cameras of a batch of the loader, on the model's device."""
        images, pids = self.parse_data_for_train(data)
        camids = None
        if "camid" in data:
            camids = self.repeated(data["camid"], data["img"]).to(self.device, non_blocking=True)
        return Batch(images.to(self.device, non_blocking=True), pids.to(self.device, non_blocking=True), camids)

    def parse_data_for_train(self, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The images and identities of a batch of the loader; every augmented view is an image of its own."""
        return self.as_images(data["img"]), self.repeated(data["pid"], data["img"])

    def as_images(self, given: Any) -> Tensor:
        """The images (N, C, H, W) of a batch; of torchreid's list of k augmented views of each, all views (k * N, ...).
        The views of an image stay together: several processes have the order of one, on which a memory depends."""
        return given if isinstance(given, Tensor) else torch.stack(list(given), dim=1).flatten(0, 1)

    def repeated(self, labels: Tensor, given: Any) -> Tensor:
        """The labels of a batch, shape (N,), once for each of the images that ``as_images`` makes of it."""
        return labels if isinstance(given, Tensor) else labels.repeat_interleave(len(given))

    def forward(self, images: Tensor) -> Any:
        """What the model returns in training; ``amp`` sets the precision inside, and the output is in float32."""
        if self.options.skip_nonfinite:
            self._put_back = states.keep_buffers([*self._models.values(), *states.losses_of(self).values()])
        return self.stepper.forward(self.model, images)

    def compute_losses(self, output: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss, a scalar, of what ``forward`` returned for ``batch.images``, and the values to log by name."""
        raise NotImplementedError

    def step(self, loss: Tensor) -> None:
        """Steps the optimizers of every registered model on a loss; several processes step on the mean of their losses.
        Raises FloatingPointError if the loss is not finite, unless ``skip_nonfinite`` is set."""
        self.stepped = True
        value = loss.detach().clone()
        distributed.average([value])
        if torch.isfinite(value):
            self.stepper.step(loss, [optimizer for optimizer in self._optims.values() if optimizer is not None])
            return
        place = f"epoch {self.epoch + 1}, batch {self.batch_idx + 1}"
        if not self.options.skip_nonfinite:
            cure = f"try a smaller learning rate, now {self.get_current_lr()}"
            raise FloatingPointError(f"the loss is {value.item()} in {place}: {cure}{self._checkpoints.last_good()}")
        self._put_back()
        self.skipped += 1
        print(f"Skipped {place}: the loss is {value.item()}")

    def check_stepper(self) -> None:
        """Raises InputError, after a step, for options that had no effect because an own ``forward_backward`` does not
        call ``forward`` and ``step``."""
        names = ("amp", "compiled", "chunk_size", "skip_nonfinite")
        asked = [name for name in names if getattr(self.options, name) != getattr(RunOptions, name)]
        asked += ["several processes"] * (distributed.size() > 1)
        if asked and not (self.stepped and self.stepper._networks):
            alone = f"{type(self).__name__}.forward_backward steps by itself, which leaves out {', '.join(asked)}"
            raise InputError(f"{alone}: call self.forward and self.step in it, or override compute_losses instead")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


class Tracklets:
    """Mixed into an engine: trains on the frames of tracklets and tests on their pooled features. torchreid's video
    engines take no tracklets of different lengths in a batch. Raises InputError for an unknown ``pooling_method``."""

    model: Any
    train_loader: Any
    test_loader: Any

    def __init__(self, *args: Any, pooling_method: str = "avg", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if pooling_method not in POOLING:
            raise InputError(f"pooling_method must be 'avg' or 'max', got {pooling_method!r}")
        self.pooling_method = pooling_method
        loaders = [loader for splits in self.test_loader.values() for loader in splits.values()]
        for loader in [self.train_loader, *loaders]:
            if loader.collate_fn is default_collate:
                loader.collate_fn = collate_tracklets

    def as_images(self, given: Tensor) -> Tensor:
        return given[_filled(given)]

    def repeated(self, labels: Tensor, given: Tensor) -> Tensor:
        return labels.repeat_interleave(_filled(given).sum(1))

    def extract_features(self, images: Tensor) -> Tensor:
        filled, pool = _filled(images), POOLING[self.pooling_method]
        of_each = self.model(images[filled]).split(filled.sum(1).tolist())
        return torch.stack([pool(features) for features in of_each])


def _filled(images: Tensor) -> Tensor:
    """Where a batch of tracklets has frames, and not the filling of ``collate_tracklets``; shape (N, longest)."""
    return ~images[:, :, 0, 0, 0].isnan()


def collate_tracklets(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of tracklets, shape (N, longest, C, H, W); shorter ones are filled up with frames of NaN."""
    longest = max(len(item["img"]) for item in items)

    def padded(images: Tensor) -> Tensor:
        return torch.cat([images, images.new_full((longest - len(images), *images.shape[1:]), torch.nan)])

    return default_collate([{**item, "img": padded(item["img"])} for item in items])


class Stepper:
    """Runs the network in the precision of ``amp``, and steps the optimizers, in every process of a run alike.

    The network's outputs leave it in float32 (float64 stays), so that the loss is never in half precision. The network,
    and every parameter of the optimizers besides, gets the mean of the processes' gradients. ``amp``, ``compiled`` and
    ``chunk_size`` are those of ``RunOptions``; ``device_type`` of the network is ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, amp: str = "off", compiled: bool = False, device_type: str = "cpu", chunk_size: int = 0) -> None:
        self.dtype = AMP[amp]
        self.scaler = torch.amp.GradScaler(device_type, enabled=amp == "fp16")
        self._compiled, self._chunk_size = compiled, chunk_size
        self._overflows: Tensor | int = 0
        # Each with which of its parameters trained when it was made.
        self._networks: dict[nn.Module, tuple[list[bool], Any]] = {}

    def forward(self, model: nn.Module, images: Tensor) -> Any:
        """The network's training output, tensors or nested tuples, lists and dictionaries of them."""
        network = self._network(model)
        with nullcontext() if self.dtype is None else torch.autocast(images.device.type, self.dtype):
            output = forward_in_chunks(network, images, self._chunk_size) if self._chunk_size else network(images)
        if self.dtype is None:
            return output
        return tree_map_only(Tensor, lambda part: part.float() if part.dtype in AMP.values() else part, output)

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

    def step(self, loss: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Back-propagates a loss and steps the optimizers; those that no gradient reached stay as they are. Raises
        InputError if it reaches none."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        if loss.requires_grad:
            self.scaler.scale(loss).backward()
        weights = {each: [p for group in each.param_groups for p in group["params"]] for each in optimizers}
        in_networks = {parameter for model in self._networks for parameter in model.parameters()}
        every = dict.fromkeys(p for of_one in weights.values() for p in of_one)
        distributed.average(p.grad for p in every if p not in in_networks)
        reached = [each for each, of_one in weights.items() if any(p.grad is not None for p in of_one)]
        if not reached:
            nothing = "the loss has no gradient in any weight that trains"
            raise InputError(f"{nothing}: open other layers (open_layers), or raise weight_x")
        one = torch.ones_like(loss.detach())
        before = self.scaler.scale(one)
        for optimizer in reached:
            self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.is_enabled():
            # A tensor, because reading it would wait for the GPU at every step. A scale of 0 cannot fall any more.
            self._overflows = self._overflows + ((self.scaler.scale(one) < before) | (before == 0))

    def overflows(self) -> int:
        """How many steps fp16 left out since the last call, because a scaled gradient was infinite or NaN."""
        number, self._overflows = int(self._overflows), 0
        return number
