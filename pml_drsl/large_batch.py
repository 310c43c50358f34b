"""The loss of a batch too large for memory, with the gradient of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pml_drsl.checks import InputError
from pml_drsl.chunks import check_chunks, forward_in_chunks


class LargeBatch(nn.Module):
    """The loss of a whole batch, for a network that has memory for a part of the batch alone.

    The network embeds the images chunk by chunk, without a graph. The loss compares all embeddings. ``backward()``
    computes the gradient of the loss with respect to the embeddings, then embeds each chunk again, now with a graph,
    and sends the chunk's part of that gradient into the weights. The weights get the gradient of the whole batch, up to
    rounding. Accumulating the losses of small batches does not give that gradient: many small rankings are not one
    large ranking. The price is a second forward pass of the network. The method is that of Revaud et al., "Learning
    with Average Precision" (ICCV 2019), and of Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
    Limited Setup" (2021).

    The memory needed is that of one chunk's graph, and of the embeddings and the loss of the whole batch. A batch that
    fits in one chunk takes the ordinary path, with one forward pass.

    - Random layers, such as dropout, draw the same numbers for a chunk in both passes, from torch's generators of the
      CPU and of the CUDA devices in use.
    - Batch normalisation in training sees one chunk at a time, as it sees one process's share without SyncBatchNorm:
      its output depends on ``chunk_size``. Its running statistics are updated by the first pass alone, so that every
      image counts once.
    - Autocast: both passes run under the autocast that is on when the batch is embedded. ``GradScaler`` works as usual.
    - ``DistributedDataParallel``: give the wrapped network, and ``pml_drsl.wrappers.DistributedLossWrapper`` round the
      loss. ``chunk_size`` is that of one process. Gradients are reduced once a step, with the last chunk.
    - ``torch.autograd.grad`` cannot be used for the network's weights, whose gradients are added to ``.grad``. There is
      no gradient of the gradient.

    Example::

        large_batch = LargeBatch(network, DRSLoss(), chunk_size=32)
        loss = large_batch(images, labels)   # of 1,024 images, say
        loss.backward()

    Args:
        network: takes images, shape (N, ...), and returns embeddings, shape (N, D), or tuples, lists or dictionaries of
            tensors of length N.
        loss: a loss of pytorch-metric-learning or of this package, in a memory or another wrapper or not, or any
            function of what the network returns and of the labels.
        chunk_size: largest number of images that the network embeds at a time, >= 1. The chunks of a batch differ by
            one image at most: with a ``chunk_size`` of 16, 20 images are embedded as 10 and 10.
        miner: a miner of pytorch-metric-learning, for a network that returns embeddings alone. It sees the whole batch.

    Raises:
        InputError: for a network that is no ``nn.Module``, or a ``chunk_size`` that is no integer of 1 or more.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[..., Tensor],
        chunk_size: int,
        miner: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        check_chunks(network, chunk_size)
        self.network, self.loss, self.chunk_size, self.miner = network, loss, chunk_size, miner

    def forward(self, images: Tensor, labels: Tensor, **loss_arguments: Any) -> Tensor:
        """The loss of a batch, a scalar that supports ``backward()``.

        Args:
            images: the batch, shape (N, ...), N >= 1.
            labels: of the images, shape (N,).
            **loss_arguments: further arguments of the loss, such as ``indices_tuple``, ``ref_emb`` or ``enqueue_mask``.

        Raises:
            InputError: as ``forward_in_chunks``, for labels of another length than the images, or for an
                ``indices_tuple`` beside a miner.
        """
        if isinstance(images, Tensor) and images.ndim and len(labels) != len(images):
            raise InputError(f"there are {len(images)} images and {len(labels)} labels; give one label for each image")
        output = forward_in_chunks(self.network, images, self.chunk_size)
        if self.miner is not None:
            if "indices_tuple" in loss_arguments:
                raise InputError("an indices_tuple was given, and there is a miner, which makes one; leave one out")
            if not isinstance(output, Tensor):
                raise InputError(
                    f"the network returned a {type(output).__name__}, and a miner takes embeddings alone; call the "
                    f"miner in a loss function of your own"
                )
            loss_arguments["indices_tuple"] = self.miner(output.detach(), labels)
        return self.loss(output, labels, **loss_arguments)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"
