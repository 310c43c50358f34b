"""Runs a network on a batch chunk by chunk: once without a graph, and once more in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pml_drsl.checks import InputError


def forward_in_chunks(network: nn.Module, images: Tensor, chunk_size: int) -> Any:
    """What ``network(images)`` returns, computed and differentiated with the memory of one chunk.

    This is the part of ``LargeBatch`` before the loss, for a training step of another shape: call it in place of the
    network, and go on as usual. ``LargeBatch`` says what holds for random layers, batch normalisation, autocast and
    ``DistributedDataParallel``.

    Args:
        network: takes images, and returns a tensor of length N, or tuples, lists or dictionaries of such tensors.
        images: the batch, shape (N, ...), N >= 1.
        chunk_size: largest number of images in a chunk, >= 1.

    Raises:
        InputError: for a network that is no ``nn.Module``, a ``chunk_size`` that is no integer of 1 or more, images
            that are no tensor or an empty one, or an output of another kind or length.
    """
    check_chunks(network, chunk_size)
    if not isinstance(images, Tensor) or images.ndim == 0 or len(images) == 0:
        given = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images must be a tensor of shape (N, ...) with one image or more, got {given}")
    if len(images) <= chunk_size:
        output = network(images)
        _check_output(output, len(images))
        return output
    passes = _TwoPasses(network, images, number=-(-len(images) // chunk_size))
    # Autograd records a function only if one of its inputs needs a gradient, and images seldom do.
    trained = any(parameter.requires_grad for parameter in network.parameters())
    outputs = _InChunks.apply(passes, images, torch.empty(0, requires_grad=trained))
    return tree_unflatten(list(outputs), passes.structure)


def check_chunks(network: nn.Module, chunk_size: int) -> None:
    """Raises InputError for a network that is no module, or a ``chunk_size`` that is no integer of 1 or more."""
    if not isinstance(network, nn.Module):
        raise InputError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise InputError(f"chunk_size must be an integer of 1 or more, got {chunk_size!r}")


def _check_output(output: Any, number: int) -> None:
    for part in tree_leaves(output):
        if not isinstance(part, Tensor):
            raise InputError(
                f"the network must return a tensor, or tuples, lists or dictionaries of tensors; what it returned has "
                f"an object of type {type(part).__name__} in it"
            )
        if part.ndim == 0 or len(part) != number:
            raise InputError(
                f"the network returned a tensor of shape {tuple(part.shape)} for {number} images; every tensor must "
                f"have one row for each image"
            )


class _InChunks(torch.autograd.Function):
    """Runs the first pass forward, and the second pass backward."""

    @staticmethod
    def forward(ctx: Any, passes: _TwoPasses, images: Tensor, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.passes = passes
        ctx.save_for_backward(images)
        # An output that the loss leaves out has no gradient in the second pass either.
        ctx.set_materialize_grads(False)
        outputs = passes.first(images)
        ctx.mark_non_differentiable(*(part for part in outputs if not part.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, Tensor | None, None]:
        (images,) = ctx.saved_tensors
        of_images = torch.zeros_like(images) if ctx.needs_input_grad[1] else None
        ctx.passes.second(images, gradients, of_images)
        return None, of_images, None


class _TwoPasses:
    """The two forward passes of one batch, and what the second pass needs in order to repeat the first.

    Attributes:
        structure: how the network nests its output tensors, known after the first pass.
    """

    def __init__(self, network: nn.Module, images: Tensor, number: int) -> None:
        self.structure: Any = None
        self._network, self._number = network, number
        used = {tensor.device for tensor in (images, *network.parameters())}
        self._cuda = sorted({device.index for device in used if device.type == "cuda"})
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in sorted({"cpu", *(device.type for device in used)})
        ]
        self._buffers = _copies(network)
        self._random: list[list[Tensor]] = []

    def first(self, images: Tensor) -> list[Tensor]:
        """The tensors that the network returns for all images, without a graph."""
        parts = []
        for chunk in images.tensor_split(self._number):
            self._random.append([torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._cuda)])
            output = self._network(chunk)
            _check_output(output, len(chunk))
            leaves, self.structure = tree_flatten(output)
            parts.append(leaves)
        # Autocast keeps the half-precision copies of the weights until it ends. Some releases of torch also keep the
        # copies made here, which have no graph: the second pass must not find them.
        torch.clear_autocast_cache()
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    def second(self, images: Tensor, gradients: Sequence[Tensor | None], of_images: Tensor | None) -> None:
        """Adds the gradient of every weight to its ``.grad``, and writes the gradient of the images into a tensor.

        Args:
            images: the batch again.
            gradients: of the loss with respect to each tensor that ``first`` returned; None for no gradient.
            of_images: the tensor to write into, of the images' shape; None if the images need no gradient.
        """
        reached = {index: part.tensor_split(self._number) for index, part in enumerate(gradients) if part is not None}
        places = None if of_images is None else of_images.tensor_split(self._number)
        after = _copies(self._network)
        # Batch normalisation and the like go through the same states again.
        _put_back(self._network, self._buffers)
        try:
            for number, chunk in enumerate(images.tensor_split(self._number)):
                chunk = chunk.detach().requires_grad_(places is not None)
                self._back_propagate(number, chunk, {index: parts[number] for index, parts in reached.items()})
                if places is not None and chunk.grad is not None:
                    places[number].copy_(chunk.grad)
        finally:
            _put_back(self._network, after)

    def _back_propagate(self, number: int, chunk: Tensor, gradients: dict[int, Tensor]) -> None:
        is_last = number == self._number - 1
        # DistributedDataParallel reduces what has added up when it sees the last chunk.
        add_up = nullcontext if is_last else getattr(self._network, "no_sync", nullcontext)
        with torch.enable_grad(), add_up():
            with self._as_in_first_pass(number):
                leaves = tree_leaves(self._network(chunk))
            trained = [index for index in gradients if leaves[index].requires_grad]
            if trained:
                torch.autograd.backward([leaves[i] for i in trained], [gradients[i] for i in trained])

    @contextmanager
    def _as_in_first_pass(self, number: int) -> Iterator[None]:
        """Within, random numbers and autocast are as they were when the first pass came to a chunk."""
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self._cuda))
            for settings in self._autocast:
                stack.enter_context(torch.autocast(*settings))
            cpu, *cuda = self._random[number]
            torch.set_rng_state(cpu)
            for device, state in zip(self._cuda, cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _copies(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in network.named_buffers()}


def _put_back(network: nn.Module, copies: dict[str, Tensor]) -> None:
    for name, buffer in network.named_buffers():
        # Through .data, which autograd does not count as a change. The graph of another forward pass of this network
        # may hold the buffer, and the buffer has its values again before that graph is used.
        buffer.data.copy_(copies[name])
