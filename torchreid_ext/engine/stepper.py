"""One step of the optimizers: precision, compilation, memory format, chunks, and gradients of several processes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pml_drsl.checks import InputError
from pml_drsl.large_batch import forward_in_chunks
from torchreid_ext.runtime import distributed

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stepper:
    """Runs the network in ``amp``'s precision and steps the optimizers, in every process of a run alike.

    The network's outputs leave it in float32 (float64 stays), so that the loss is never in half precision. The
    network, and every parameter of the optimizers besides, gets the mean of the processes' gradients.

    Args:
        amp: ``"off"``, ``"bf16"`` or ``"fp16"``; with ``"fp16"`` gradients are scaled.
        compiled: compile the network for training, with ``torch.compile``.
        device_type: of the network, ``"cpu"`` or ``"cuda"``.
        channels_last: keep the network's weights and images in the memory format of that name.
        chunk_size: largest number of images that the network takes at a time, with the gradients of the whole batch, as
            ``pml_drsl.LargeBatch`` explains; 0 gives the network the whole batch.

    Attributes:
        scaler: of the gradients; it does nothing but for ``"fp16"``.

    Raises:
        InputError: for another ``amp``.
    """

    def __init__(
        self,
        amp: str = "off",
        compiled: bool = False,
        device_type: str = "cpu",
        channels_last: bool = False,
        chunk_size: int = 0,
    ) -> None:
        if amp not in AMP:
            raise InputError(f"train.amp must be one of {', '.join(AMP)}, got {amp!r}")
        self.dtype = AMP[amp]
        self.scaler = torch.amp.GradScaler(device_type, enabled=amp == "fp16")
        self._compiled, self._chunk_size = compiled, chunk_size
        self._memory_format = torch.channels_last if channels_last else torch.preserve_format
        # Each with which of its parameters trained when it was made.
        self._networks: dict[nn.Module, tuple[list[bool], Any]] = {}

    def forward(self, model: nn.Module, images: Tensor) -> Any:
        """The network's training output, tensors or nested tuples, lists and dictionaries of them."""
        network = self._network(model)
        images = images.to(memory_format=self._memory_format)
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
        network: Any = model.to(memory_format=self._memory_format)
        if self._compiled:
            network = torch.compile(network)
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
