"""pytorch-metric-learning's wrappers, for ``DRSLoss`` too.

PML admits losses to ``CrossBatchMemory`` and ``SelfSupervisedLoss`` by class name, so these are subclasses that admit
one more. The distributed wrappers add an efficient mode that is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import distributed as pml_distributed
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from pml_drsl.checks import InputError
from pml_drsl.losses import DRSLoss
from pml_drsl.miners import RankingMiner
from pml_drsl.pairs import IndicesTuple, Pairs


class SelfSupervisedLoss(losses.SelfSupervisedLoss):
    """PML's ``SelfSupervisedLoss``, which also accepts ``DRSLoss``."""

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.SelfSupervisedLoss.supported_losses(), DRSLoss.__name__]


class CrossBatchMemory(losses.CrossBatchMemory):
    """PML's ``CrossBatchMemory``, which also accepts ``DRSLoss``.

    No query is its own positive: PML forgets that in a batch of one. ``RankViolationMiner`` and
    ``NegativeBudgetMiner`` are told which entry of the memory is the query itself.

    Raises:
        InputError: for a batch larger than the memory, when called.
    """

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.CrossBatchMemory.supported_losses(), DRSLoss.__name__]

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: IndicesTuple | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        number = len(embeddings) if enqueue_mask is None else int(enqueue_mask.sum())
        if number > self.memory_size:
            raise InputError(f"{number} embeddings do not fit in a memory_size of {self.memory_size}; make it larger")
        return super().forward(embeddings, labels, indices_tuple, enqueue_mask)  # type: ignore[no-any-return]

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: IndicesTuple | None,
        do_remove_self_comparisons: bool,
    ) -> IndicesTuple:
        own = self.curr_batch_idx if do_remove_self_comparisons else None
        if self.miner:
            indices = _mine(self.miner, embeddings, labels, E_mem, L_mem, own)
        else:
            indices = _without_own(lmu.get_all_pairs_indices(labels, L_mem), own)
        given = input_indices_tuple
        if given is None:
            return indices
        if len(given) < len(indices):
            given = lmu.convert_to_pairs(given, labels)
        elif len(given) > len(indices):
            given = lmu.convert_to_triplets(given, labels)
        return c_f.concatenate_indices_tuples(indices, given)  # type: ignore[no-any-return]


class DistributedMinerWrapper(pml_distributed.DistributedMinerWrapper):
    """Mines the whole batch, of all processes, for ``pml_drsl.wrappers.DistributedLossWrapper``.

    Returns the same indices on every process: into the embeddings of all, in order of rank. With ``efficient=True``
    each process mines its own queries alone and the indices are then gathered. Processes may hold different numbers
    of embeddings.
    """

    def forward(
        self, emb: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> IndicesTuple:
        if _alone():
            return self.miner(emb, labels, ref_emb, ref_labels)  # type: ignore[no-any-return]
        sizes, all_emb, all_labels = _gather_batch(emb.detach(), labels)
        all_refs = None if ref_emb is None else _gather_batch(ref_emb.detach(), ref_labels)[1:]
        if not self.efficient:
            with draws_of_first(emb.device):
                return self.miner(all_emb, all_labels, *(all_refs or ()))  # type: ignore[no-any-return]
        first = sum(sizes[: dist.get_rank()])
        own = None if all_refs else torch.arange(first, first + len(emb), device=emb.device)
        indices = _mine(self.miner, emb, labels, *(all_refs or (all_emb, all_labels)), own)
        anchors = (0,) if len(indices) == 3 else (0, 2)
        gathered = [_gather(index + first if i in anchors else index)[0] for i, index in enumerate(indices)]
        return tuple(gathered)  # type: ignore[return-value]


class DistributedLossWrapper(pml_distributed.DistributedLossWrapper):
    """PML's ``DistributedLossWrapper`` with an efficient mode that is exact for ``DRSLoss``.

    Both modes return the loss of the whole batch, the same on every process (PML's returns it times their number);
    run ``backward()`` on all of them. Under ``DistributedDataParallel`` both give the gradient of one process on the
    whole batch, with any reducer, regularizer or distance, and with any number of embeddings in each process. The
    batch is that of all processes in order of rank, and so are the indices of an ``indices_tuple``, the same on every
    process, as ``pml_drsl.wrappers.DistributedMinerWrapper`` gives them.

    ``efficient=False``, any loss, and ``CrossBatchMemory``: every process computes the whole loss, with the first
    one's random numbers, and sends its gradient to its own embeddings alone. Weights of the loss get the gradient of
    one process on the whole batch, and a memory is the same, everywhere.

    ``efficient=True``, ``DRSLoss`` alone: every process computes the errors of its own queries, and the errors are
    gathered before they are reduced. (PML's efficient mode gathers embeddings without their gradient, so that
    references of other processes get none: another gradient than that of the whole batch.)

    Raises:
        InputError: for ``efficient=True`` with another loss than ``DRSLoss``.
    """

    def __init__(self, loss: torch.nn.Module, efficient: bool = False) -> None:
        super().__init__(loss, efficient)
        if efficient and not isinstance(loss, DRSLoss):
            raise InputError(f"efficient=True is for DRSLoss, got {type(loss).__name__}; give efficient=False")

    def forward_regular_loss(
        self,
        emb: Tensor,
        labels: Tensor | None,
        indices_tuple: IndicesTuple | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        world_size: int,
    ) -> Tensor:
        if world_size <= 1:
            return self.loss(emb, labels, indices_tuple, ref_emb, ref_labels)  # type: ignore[no-any-return]
        sizes, all_emb, all_labels = _gather_batch(emb, labels, share_gradients=self.efficient)
        all_refs = None if ref_emb is None else _gather_batch(ref_emb, ref_labels, share_gradients=self.efficient)[1:]
        with _errors_shared_out(self.loss, sizes) if self.efficient else draws_of_first(emb.device):
            loss: Tensor = self.loss(all_emb, all_labels, indices_tuple, *(all_refs or ()))
        return loss

    def forward_cross_batch(
        self,
        emb: Tensor,
        labels: Tensor,
        indices_tuple: IndicesTuple | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        world_size: int,
        enqueue_mask: Tensor | None,
    ) -> Tensor:
        if ref_emb is not None or ref_labels is not None:
            raise InputError("a CrossBatchMemory has its own references: it takes no ref_emb and ref_labels")
        if world_size <= 1:
            return self.loss(emb, labels, indices_tuple, enqueue_mask)  # type: ignore[no-any-return]
        # In order of rank: PML has each process's own first, and so another memory on each.
        _, all_emb, all_labels = _gather_batch(emb, labels)
        if enqueue_mask is not None:
            # Not every backend gathers truth values.
            enqueue_mask = _gather(enqueue_mask.to(emb.device, torch.uint8))[0].bool()
        with draws_of_first(emb.device):
            return self.loss(all_emb, all_labels, indices_tuple, enqueue_mask)  # type: ignore[no-any-return]


def gather_batch(*parts: Tensor) -> tuple[Tensor, ...]:
    """Embeddings, labels or whatever else of a batch, shapes (N, ...), of all processes in order of rank.

    The gradient of a loss that every process computes of them goes to each process's own, times the number of
    processes, by which ``DistributedDataParallel`` divides again. In a run of one process they are returned unchanged.
    """
    if _alone():
        return parts
    return tuple(_gather(part)[0] for part in parts)


@contextmanager
def draws_of_first(device: torch.device) -> Iterator[None]:
    """Within, every process draws the first one's random numbers, on the CPU and on ``device``."""
    if _alone():
        yield
        return
    on_device = device.type == "cuda"
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_device else [])]
    for state in states:
        sent = state.to(device)
        dist.broadcast(sent, 0)
        state.copy_(sent)
    if dist.get_rank() == 0:
        yield
        return
    with torch.random.fork_rng([device] if on_device else []):
        torch.set_rng_state(states[0])
        if on_device:
            torch.cuda.set_rng_state(states[1], device)
        yield


def _alone() -> bool:
    return not pml_distributed.is_distributed() or dist.get_world_size() == 1


@contextmanager
def _errors_shared_out(loss: DRSLoss, sizes: list[int]) -> Iterator[None]:
    """Within, ``loss`` computes the errors of this process's queries alone and gathers the others'."""
    compute = loss.compute_errors
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    rank = dist.get_rank()
    mine = slice(*bounds[rank : rank + 2].tolist())

    def shared(embeddings: Tensor, ref_emb: Tensor, pairs: Pairs) -> tuple[Tensor, ...]:
        counts = torch.searchsorted(pairs.query, bounds.to(pairs.query.device)).diff().tolist()
        # Without a pair of its own a process still has to take part in every gathering, forward and backward.
        nothing = embeddings[:0].sum() + ref_emb[:0].sum()
        errors = embeddings.new_zeros(0, 2)
        if counts[rank] > 0:
            errors = torch.stack(compute(embeddings[mine], ref_emb, pairs.rows(mine)), dim=1)
        gathered: Tensor = _Gather.apply(errors + nothing, counts, True)
        return gathered.unbind(1)

    loss.compute_errors = shared  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del loss.compute_errors


def _mine(
    miner: miners.BaseMiner, emb: Tensor, labels: Tensor, refs: Tensor, ref_labels: Tensor | None, own: Tensor | None
) -> IndicesTuple:
    """The miner's indices without pairs of a query and itself, which is candidate ``own[query]`` (None: none is)."""
    if isinstance(miner, RankingMiner):
        return miner(emb, labels, refs, ref_labels, own)  # type: ignore[no-any-return]
    return _without_own(miner(emb, labels, refs, ref_labels), own)


def _without_own(indices: IndicesTuple, own: Tensor | None) -> IndicesTuple:
    if own is None:
        return indices
    keep = own[indices[0]] != indices[1]
    number = 3 if len(indices) == 3 else 2
    return (*(index[keep] for index in indices[:number]), *indices[number:])  # type: ignore[return-value]


def _gather_batch(
    emb: Tensor, labels: Tensor | None, share_gradients: bool = False
) -> tuple[list[int], Tensor, Tensor | None]:
    """Number of embeddings of each process, and the embeddings and labels of all, in order of rank."""
    all_emb, sizes = _gather(emb, share_gradients)
    return sizes, all_emb, None if labels is None else _gather(labels.to(emb.device))[0]


def _gather(x: Tensor, share_gradients: bool = False) -> tuple[Tensor, list[int]]:
    """``x`` of all processes, of any lengths, in order of rank, and the lengths."""
    length = torch.tensor([len(x)], device=x.device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    sizes = [int(length) for length in lengths]
    return _Gather.apply(x, sizes, share_gradients), sizes


class _Gather(torch.autograd.Function):
    """Concatenates what all processes have. The gradient of a process's part is the sum over all processes' copies,
    or, where all compute the same of them and none is shared, that of its own copy times their number."""

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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.share_gradients:
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad)
            return grad[ctx.mine], None, None
        return grad[ctx.mine] * dist.get_world_size(), None, None
