"""One step of the optimizers: mixed precision, compilation, and what happens to a loss that is not finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stepper:
    """Runs the network in ``amp``'s precision and steps the optimizers.

    The network's outputs leave it in float32 (float64 stays), so that the loss is never in half precision.

    Args:
        amp: ``"off"``, ``"bf16"`` or ``"fp16"``; with ``"fp16"`` gradients are scaled.
        compiled: compile the network for training, with ``torch.compile``.
        device_type: of the network, ``"cpu"`` or ``"cuda"``.

    Attributes:
        scaler: of the gradients; it does nothing but for ``"fp16"``.

    Raises:
        ValueError: for another ``amp``.
    """

    def __init__(self, amp: str = "off", compiled: bool = False, device_type: str = "cpu") -> None:
        if amp not in AMP:
            raise ValueError(f"train.amp must be one of {', '.join(AMP)}, got {amp!r}")
        self.dtype = AMP[amp]
        self.scaler = torch.amp.GradScaler(device_type, enabled=amp == "fp16")
        self._compiled = compiled
        self._networks: dict[nn.Module, Any] = {}

    def forward(self, model: nn.Module, images: Tensor) -> Any:
        """The network's training output, tensors or nested tuples, lists and dictionaries of them."""
        # The module itself stays as it is: evaluation, with batches of other sizes, would be compiled time and again.
        if self._compiled and model not in self._networks:
            self._networks[model] = torch.compile(model)
        network = self._networks.get(model, model)
        if self.dtype is None:
            return network(images)
        with torch.autocast(images.device.type, self.dtype):
            output = network(images)
        return _in_float32(output)

    def step(self, loss: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Back-propagates a loss and steps the optimizers; those that no gradient reached stay as they are."""
        optimizers = list(optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.scaler.scale(loss).backward()
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
