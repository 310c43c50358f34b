"""The loss of a batch too large for memory, with the gradient of the whole batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pml_drsl.checks import InputError, is_whole
from pml_drsl.fused import check_once


class LargeBatch(nn.Module):
    """The loss of a whole batch, for a network that has memory for a part of the batch alone.

    The network embeds the images chunk by chunk, without a graph, and the loss compares all embeddings. ``backward()``
    embeds each chunk again, now with a graph. The weights get the gradient of the whole batch, up to rounding and batch
    normalisation, which accumulating the losses of small batches does not give. (Revaud et al., ICCV 2019; Gao et al.,
    arXiv:2101.06983.)

    The memory needed is that of one chunk's graph, and of the embeddings and the loss of the whole batch. The price is
    a second forward pass. A batch that fits in one chunk needs none.

    - Random layers draw the same numbers for a chunk in both passes, from the global generators of torch, numpy and
      Python, and both passes run under the same autocast. A layer with a generator of its own draws others.
    - Batch normalisation in training sees one chunk at a time, so its output depends on ``chunk_size``. Its running
      statistics are updated by the first pass alone.
    - ``DistributedDataParallel``: give the wrapped network, and ``pml_drsl.wrappers.DistributedLossWrapper`` round the
      loss. ``chunk_size`` is that of one process. Gradients are reduced once a step, with the last chunk. Its option
      ``static_graph=True`` does not work.
    - The weights' gradients are added to ``.grad``, so ``torch.autograd.grad`` cannot be used, nor second gradients.

    Example::

        large_batch = LargeBatch(network, DRSLoss(), chunk_size=32)
        loss = large_batch(images, labels)   # of 1,024 images, say
        loss.backward()

    Args:
        network: takes images, shape (N, ...), and returns embeddings, shape (N, D), or tuples, lists or dictionaries of
            tensors of length N.
        loss: any function of what the network returns and of the labels, such as a loss of pytorch-metric-learning.
        chunk_size: largest number of images to embed at a time, >= 1. Chunks differ by one image at most: with a
            ``chunk_size`` of 16, 20 images are embedded as 10 and 10.
        miner: a miner of pytorch-metric-learning, for a network that returns embeddings alone. It sees the whole batch,
            and the ``ref_emb`` and ``ref_labels`` that the loss gets.

    Raises:
        InputError: for a network that is no ``nn.Module`` or has a ``static_graph``, or a ``chunk_size`` that is no
            integer of 1 or more.
    """

    def __init__(
        self, network: nn.Module, loss: Callable[..., Tensor], chunk_size: int, miner: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        _check_chunks(network, chunk_size)
        self.network, self.loss, self.chunk_size, self.miner = network, loss, chunk_size, miner

    def forward(self, images: Tensor, labels: Tensor, **loss_arguments: Any) -> Tensor:
        """The loss of a batch, a scalar: images of shape (N, ...), N >= 1, and labels of shape (N,).

        Further arguments are those of the loss, such as ``indices_tuple``, ``ref_emb`` or ``enqueue_mask``. Raises
        InputError as ``forward_in_chunks``, for labels of another length, and for an ``indices_tuple`` with a miner."""
        if isinstance(images, Tensor) and images.ndim and len(labels) != len(images):
            raise InputError(f"there are {len(images)} images and {len(labels)} labels; give one label for each image")
        output = forward_in_chunks(self.network, images, self.chunk_size)
        if self.miner is not None:
            if "indices_tuple" in loss_arguments:
                raise InputError("an indices_tuple was given, and there is a miner, which makes one; leave one out")
            if not isinstance(output, Tensor):
                given = f"the network returned a {type(output).__name__}, and a miner takes embeddings alone"
                raise InputError(f"{given}; call the miner in a loss function of your own")
            refs = {name: loss_arguments[name] for name in ("ref_emb", "ref_labels") if name in loss_arguments}
            loss_arguments["indices_tuple"] = self.miner(output.detach(), labels, **refs)
        return self.loss(output, labels, **loss_arguments)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"


def forward_in_chunks(network: nn.Module, images: Tensor, chunk_size: int) -> Any:
    """What ``network(images)`` returns, computed and differentiated with the memory of one chunk.

    It is the part of ``LargeBatch``, which describes it, before the loss: call it in place of the network. Raises
    InputError as ``LargeBatch``, for images that are no tensor of shape (N, ...), N >= 1, and for any other output."""
    _check_chunks(network, chunk_size)
    if not isinstance(images, Tensor) or images.ndim == 0 or len(images) == 0:
        given = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images must be a tensor of shape (N, ...) with one image or more, got {given}")
    if len(images) <= chunk_size:
        return _checked_output(network(images), len(images))
    number, structure = -(-len(images) // chunk_size), list[Any]()
    # Autograd records a function only if one of its inputs needs a gradient, and images seldom do.
    trained = any(parameter.requires_grad for parameter in network.parameters())
    outputs = _InChunks.apply(network, number, structure, images, torch.empty(0, requires_grad=trained))
    return tree_unflatten(list(outputs), *structure)


def _check_chunks(network: nn.Module, chunk_size: int) -> None:
    if not isinstance(network, nn.Module):
        raise InputError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    if isinstance(network, nn.parallel.DistributedDataParallel) and network.static_graph:
        why = "DistributedDataParallel(static_graph=True) takes no pass without a graph, as the first over chunks is"
        raise InputError(f"{why}; leave static_graph out")
    if not is_whole(chunk_size) or chunk_size < 1:
        raise InputError(f"chunk_size must be an integer of 1 or more, got {chunk_size!r}")


def _checked_output(output: Any, number: int) -> Any:
    for part in tree_leaves(output):
        if not isinstance(part, Tensor):
            wanted = "the network must return a tensor, or tuples, lists or dictionaries of tensors"
            raise InputError(f"{wanted}; what it returned has an object of type {type(part).__name__} in it")
        if part.ndim == 0 or len(part) != number:
            given = f"the network returned a tensor of shape {tuple(part.shape)} for {number} images"
            raise InputError(f"{given}; every tensor must have one row for each image")
    return output


class _InChunks(torch.autograd.Function):
    """The first pass is its forward, the second its backward. ``structure`` receives that of the network's output."""

    @staticmethod
    def forward(
        ctx: Any, network: nn.Module, number: int, structure: list[Any], images: Tensor, anchor: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.network, ctx.number = network, number
        ctx.save_for_backward(images)
        ctx.set_materialize_grads(False)  # An output that the loss leaves out has no gradient in the second pass.
        used = {tensor.device for tensor in (images, *network.parameters())}
        ctx.devices = sorted((device for device in used if device.type != "cpu"), key=str)
        ctx.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in sorted({"cpu", *(device.type for device in used)})
        ]
        ctx.buffers, ctx.random, parts = copied_buffers(network), [], []
        for chunk in images.tensor_split(number):
            ctx.random.append(_random_states(ctx.devices))
            leaves, spec = tree_flatten(_checked_output(network(chunk), len(chunk)))
            parts.append(leaves)
        structure.append(spec)
        torch.clear_autocast_cache()  # The second pass must not find half-precision weights, which have no graph.
        outputs = [torch.cat(part) for part in zip(*parts, strict=True)]
        ctx.mark_non_differentiable(*(part for part in outputs if not part.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, None, Tensor | None, None]:
        check_once("LargeBatch", "call the network itself")
        (images,) = ctx.saved_tensors
        of_images = torch.zeros_like(images) if ctx.needs_input_grad[3] else None
        split = [[None] * ctx.number if part is None else part.tensor_split(ctx.number) for part in gradients]
        after, random_after = copied_buffers(ctx.network), _random_states(ctx.devices)
        put_back_buffers(ctx.network, ctx.buffers)  # Batch normalisation and the like go through the same states again.
        try:
            for number, (chunk, *parts) in enumerate(zip(images.tensor_split(ctx.number), *split, strict=True)):
                chunk = chunk.detach().requires_grad_(of_images is not None)
                _back_propagate(ctx, number, chunk, parts)
                if of_images is not None and chunk.grad is not None:
                    of_images.tensor_split(ctx.number)[number].copy_(chunk.grad)
        finally:
            put_back_buffers(ctx.network, after)
            _set_random_states(ctx.devices, random_after)
        return None, None, None, of_images, None


def _back_propagate(ctx: Any, number: int, chunk: Tensor, gradients: Sequence[Tensor | None]) -> None:
    # DistributedDataParallel reduces what has added up when it sees the last chunk.
    add_up = nullcontext if number == ctx.number - 1 else getattr(ctx.network, "no_sync", nullcontext)
    with torch.enable_grad(), add_up():
        with ExitStack() as stack:  # Random numbers and autocast are as in the first pass.
            for settings in ctx.autocast:
                stack.enter_context(torch.autocast(*settings))
            _set_random_states(ctx.devices, ctx.random[number])
            leaves = tree_leaves(ctx.network(chunk))
        reached = [(a, b) for a, b in zip(leaves, gradients, strict=True) if b is not None and a.requires_grad]
        if reached:
            torch.autograd.backward([leaf for leaf, _ in reached], [gradient for _, gradient in reached])


def _random_states(devices: Sequence[torch.device]) -> list[Any]:
    """The states of the global generators that a network on some devices, beside the CPU, may draw from."""
    states = [torch.get_device_module(device).get_rng_state(device) for device in devices]
    return [random.getstate(), np.random.get_state(), torch.get_rng_state(), *states]


def _set_random_states(devices: Sequence[torch.device], states: Sequence[Any]) -> None:
    python, numpy, cpu, *others = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    for device, state in zip(devices, others, strict=True):
        torch.get_device_module(device).set_rng_state(state, device)


def copied_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers of a network, such as the statistics of batch normalisation, by name."""
    return {name: buffer.detach().clone() for name, buffer in network.named_buffers()}


def put_back_buffers(network: nn.Module, copies: dict[str, Tensor]) -> None:
    """Gives the buffers of a network the values of ``copied_buffers``."""
    for name, buffer in network.named_buffers():
        # A buffer that a forward pass made or resized, such as a table of positions, has no state to put back.
        if name not in copies or copies[name].shape != buffer.shape:
            continue
        # Autograd does not count this as a change: the graph of another pass that holds the buffer finds its values.
        buffer.data.copy_(copies[name])
