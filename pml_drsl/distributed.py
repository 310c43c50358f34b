"""Miners and losses that see the batch of all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pytorch_metric_learning.losses import CrossBatchMemory
from pytorch_metric_learning.utils import distributed as pml_distributed
from torch import Tensor
from torch import distributed as dist

from pml_drsl.checks import InputError
from pml_drsl.fused import check_once
from pml_drsl.losses import Compute, DRSLoss, Errors
from pml_drsl.miners import RankingMiner
from pml_drsl.pairs import IndicesTuple, Pairs


class DistributedMinerWrapper(pml_distributed.DistributedMinerWrapper):
    """Mines the batch of all processes, for ``DistributedLossWrapper``: every process gets the same indices, into the
    embeddings of all in order of rank.

    Args:
        miner: any miner of PML. A TypeError refuses anything else.
        efficient: each process mines its own queries only, and the indices are gathered. This is for the miners of this
            package: PML's cannot be told which candidate is the query itself, and always mine the whole batch.
    """

    def forward(
        self, emb: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> IndicesTuple:
        """The miner's indices; the arguments are those of this process, and of the shapes that the miner takes. Raises
        InputError for ``ref_labels`` without ``ref_emb``."""
        if ref_emb is None and ref_labels is not None:
            raise InputError("ref_labels without ref_emb: give both, or neither")
        if is_single_process():
            return self.miner(emb, labels, ref_emb, ref_labels)  # type: ignore[no-any-return]
        with torch.no_grad():
            (*batch, all_ref_emb, all_ref_labels), sizes = _of_all(emb, labels, ref_emb, ref_labels)
        if not (self.efficient and isinstance(self.miner, RankingMiner)):
            with draws_of_first(emb.device):
                return self.miner(*batch, all_ref_emb, all_ref_labels)  # type: ignore[no-any-return]
        first = sum(sizes[: dist.get_rank()])
        own = torch.arange(first, first + len(emb), device=emb.device)
        refs = batch if ref_emb is None else (all_ref_emb, all_ref_labels)
        indices = self.miner(emb, labels, *refs, own if ref_emb is None or ref_emb is emb else None)
        gathered = [_gather(index if i % 2 else index + first)[0] for i, index in enumerate(indices)]
        return tuple(gathered)  # type: ignore[return-value]


class DistributedLossWrapper(pml_distributed.DistributedLossWrapper):
    """PML's ``DistributedLossWrapper`` with an efficient mode that is exact for ``DRSLoss``.

    Both modes return the loss of the whole batch, the embeddings of all processes in order of rank, whose numbers may
    differ. Every process gets the same value (PML's wrapper returns it times the number of processes) and must run
    ``backward()``. Under ``DistributedDataParallel`` both modes give the gradient of one process on the whole batch.
    An ``indices_tuple`` points into the whole batch and must be the same on every process, as that of
    ``DistributedMinerWrapper`` is.

    Args:
        loss: any loss of PML, or ``CrossBatchMemory``, which is then the same on every process. A TypeError refuses
            anything else.
        efficient: False: every process computes the whole loss with the random numbers of the first, and sends the
            gradient to its own embeddings only. Weights of the loss get the gradient of one process on the whole batch.
            True is for ``DRSLoss`` only: every process computes the errors of its own queries, and the errors are
            gathered before they are reduced. (PML's efficient mode gathers embeddings without their gradient.) An
            InputError refuses any other loss, a learnable temperature or margin, and a memory called with ``ref_emb``.
    """

    def __init__(self, loss: torch.nn.Module, efficient: bool = False) -> None:
        super().__init__(loss)
        if efficient and not isinstance(loss, DRSLoss):
            raise InputError(f"efficient=True is for DRSLoss, got {type(loss).__name__}; give efficient=False")
        self.efficient = efficient

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of the batch of all processes; of one process, that of its batch. For the arguments see
        ``DRSLoss`` and ``CrossBatchMemory``."""
        has_memory = isinstance(self.loss, CrossBatchMemory)
        if has_memory and not (ref_emb is None and ref_labels is None):
            raise InputError("a CrossBatchMemory has its own references; call it without ref_emb and ref_labels")
        others = (enqueue_mask,) if has_memory else (ref_emb, ref_labels)
        if is_single_process():
            return self.loss(embeddings, labels, indices_tuple, *others)  # type: ignore[no-any-return]
        # In order of rank, so that every process has the same memory. PML's wrapper puts each process's own part first.
        of_all, sizes = _of_all(embeddings, labels, *others, share_gradients=self.efficient)
        with _sharing_queries(self.loss, sizes) if self.efficient else draws_of_first(embeddings.device):
            return self.loss(*of_all[:2], indices_tuple, *of_all[2:])  # type: ignore[no-any-return]


def gather_batch(*parts: Tensor) -> tuple[Tensor, ...]:
    """The parts of a batch, such as embeddings and labels, shapes (N, ...), of all processes in order of rank.

    Every process must compute the same loss of them. Its gradient then goes to the process's own part, times the number
    of processes, by which ``DistributedDataParallel`` divides again. One process gets its parts back unchanged."""
    return parts if is_single_process() else tuple(_of_all(*parts)[0])


@contextmanager
def draws_of_first(device: torch.device) -> Iterator[None]:
    """Inside, every process draws the random numbers of the first process, on the CPU and on ``device``."""
    if is_single_process():
        yield
        return
    cuda = [device] if device.type == "cuda" else []
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in cuda)]
    for state in states:
        sent = state.to(device)
        dist.broadcast(sent, 0)
        state.copy_(sent)
    with torch.random.fork_rng(cuda) if dist.get_rank() else nullcontext():
        torch.set_rng_state(states[0])
        for each in cuda:
            torch.cuda.set_rng_state(states[1], each)
        yield


def is_single_process() -> bool:
    return not pml_distributed.is_distributed() or dist.get_world_size() == 1


@contextmanager
def _sharing_queries(loss: DRSLoss, sizes: list[int]) -> Iterator[None]:
    """Inside, ``loss`` computes the errors of this process's queries and gathers the errors of the other queries."""
    for name in ("temperature", "margin"):  # Each process would learn from its own queries alone.
        if getattr(getattr(loss, name), "requires_grad", False):
            raise InputError(f"a learnable {name} needs efficient=False")

    def shared(compute: Compute, embeddings: Tensor, ref_emb: Tensor, pairs: Pairs) -> Errors:
        rank, parts = dist.get_rank(), pairs.split(sizes)
        # A process without a pair still has to take part in every gathering, forward and backward.
        nothing = embeddings[:0].sum() + ref_emb[:0].sum()
        names = ["retrieval"] + ["sort"] * bool(loss.sort_weight) + ["smoothed"] * loss.collect_stats
        errors = embeddings.new_zeros(0, len(names))
        if parts[rank].num_queries > 0:
            own = compute(embeddings.split(sizes)[rank], ref_emb, parts[rank])
            errors = torch.stack([own[name] for name in names], dim=1)
        gathered: Tensor = _Gather.apply(errors + nothing, [len(part.query) for part in parts], True)
        of_all = dict(zip(names, gathered.unbind(1), strict=True))
        return {name: part.detach() if name == "smoothed" else part for name, part in of_all.items()}

    loss.shared = shared
    try:
        yield
    finally:
        loss.shared = None


def _of_all(first: Tensor, *others: Tensor | None, share_gradients: bool = False) -> tuple[list[Any], list[int]]:
    """The parts of a batch of all processes in order of rank, and the length of the first part on each. None stays so.

    A tensor that is given twice is gathered once: DRSLoss tells the batch itself from references by the object of the
    embeddings, and PML's losses by that of the labels."""
    parts = first, *others
    tensors = {id(part): part.to(first.device) for part in parts if part is not None}
    gathered = {key: _gather(tensor, share_gradients) for key, tensor in tensors.items()}
    return [None if part is None else gathered[id(part)][0] for part in parts], gathered[id(first)][1]


def _gather(x: Tensor, share_gradients: bool = False) -> tuple[Tensor, list[int]]:
    """``x`` of all processes in order of rank, and its length on each. The lengths may differ."""
    lengths = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(x)], device=x.device))
    sizes = [int(length) for length in lengths]
    return _Gather.apply(x, sizes, share_gradients), sizes


class _Gather(torch.autograd.Function):
    """Concatenates the tensors of all processes. The gradient of a part is the sum over all copies
    (``share_gradients``), or, where all compute the same loss, that of the process's own copy, times their number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], share_gradients: bool) -> Tensor:
        rank = dist.get_rank()
        ctx.mine, ctx.share_gradients = slice(sum(sizes[:rank]), sum(sizes[: rank + 1])), share_gradients
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        check_once("the batch of several processes", "use one process")
        if not ctx.share_gradients:
            return grad[ctx.mine] * dist.get_world_size(), None, None
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.mine], None, None
