"""pytorch-metric-learning's wrappers, for DRSLoss too. Two of PML's own refuse it by its name."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.miners import BaseMiner, BatchEasyHardMiner
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from pml_drsl.checks import InputError, check_arguments, is_whole
from pml_drsl.distributed import DistributedLossWrapper, DistributedMinerWrapper
from pml_drsl.losses import DRSLoss, check_batch, kind_of
from pml_drsl.miners import RankingMiner
from pml_drsl.pairs import IndicesTuple

__all__ = ["CrossBatchMemory", "DistributedLossWrapper", "DistributedMinerWrapper", "SelfSupervisedLoss"]


class SelfSupervisedLoss(losses.SelfSupervisedLoss):
    """PML's ``SelfSupervisedLoss``, which also accepts ``DRSLoss``. It is called with two views of a batch of images,
    two tensors of shape (N, dim): row i of one view is the only positive of row i of the other.

    Args:
        loss: a loss that PML's wrapper accepts, or ``DRSLoss``. An Exception refuses any other.
        symmetric: both views are queries, and all other rows of both are candidates. False: only the first view has
            queries, and only the second has candidates.
    """

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.SelfSupervisedLoss.supported_losses(), DRSLoss.__name__]


class CrossBatchMemory(losses.CrossBatchMemory):
    """PML's ``CrossBatchMemory``, which also accepts ``DRSLoss``, with a warm-up.

    The references of a batch are the embeddings in the memory, of earlier batches and of the batch itself. No query is
    its own positive (PML forgets that in a batch of one). The miners of this package are told which entry is the query.
    An ``indices_tuple`` given to a call is added to the pairs, as in PML. Its indices point into the batch, as every
    miner returns them. (PML takes them for positions in the memory, which hold other images after the first batch.)
    Without a ``miner`` all pairs are there already, and ``DRSLoss`` counts each once: give it the miner here.

    Wang et al. (XBM, CVPR 2020) start the memory after a warm-up, because the features of an untrained network drift.
    Until then the loss is computed on the batch alone, with gradients in both embeddings of a pair (with an
    ``enqueue_mask``, in the queries' alone), and nothing is stored. Unlike PML's, the ``state_dict`` holds the place in
    the queue and the number of finished warm-up calls, so that a restored run goes on exactly.

    Args:
        loss: a loss of PML that supports a memory, or ``DRSLoss``.
        embedding_size, memory_size: dimension of the embeddings, and their number in the memory, at least a batch.
        miner: a miner of PML that chooses pairs of the batch and the memory; None for all pairs.
        warmup: number of calls, 0 or more, before the memory starts. An InputError refuses another number, and in a
            call a batch larger than the memory, indices outside the batch, embeddings or an ``enqueue_mask`` of another
            shape or type, and a ``BatchEasyHardMiner`` of the easiest positives, which are the queries themselves.
    """

    def __init__(
        self,
        loss: nn.Module,
        embedding_size: int,
        memory_size: int = 1024,
        miner: BaseMiner | None = None,
        warmup: int = 0,
        **kwargs: Any,
    ) -> None:
        check_arguments(type(self), kwargs)
        super().__init__(loss, embedding_size, memory_size, miner, **kwargs)
        if not is_whole(warmup) or warmup < 0:
            raise InputError(f"warmup must be an integer of at least 0, got {warmup!r}; 0 starts the memory at once")
        self.warmup = int(warmup)
        self.embedding_memory: Tensor
        self.warmup_calls = 0

    @staticmethod
    def supported_losses() -> list[str]:
        return [*losses.CrossBatchMemory.supported_losses(), DRSLoss.__name__]

    def get_extra_state(self) -> Tensor:
        # A tensor, because scripts move and save the entries of a state_dict as such.
        return torch.tensor([self.queue_idx, int(self.has_been_filled), self.warmup_calls])

    def set_extra_state(self, state: Tensor | dict[str, int]) -> None:
        place = _place(state)
        self.queue_idx, self.has_been_filled = place[0], bool(place[1])
        self.warmup_calls = place[2] if len(place) > 2 else self.warmup_calls

    # Not a hook: PML's record keeper walks through the dictionaries of a loss, and fails at a hook in one.
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        # States of PML's memory, and of versions before 0.3, have no place in the queue, and the latter
        # count the calls apart.
        place = state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        if (calls := state_dict.pop(f"{prefix}warmup_calls", None)) is not None:
            state_dict[f"{prefix}_extra_state"] = torch.tensor([*_place(place)[:2], int(calls)])
        # A new memory is float32, and would round embeddings of float64.
        saved = state_dict.get(f"{prefix}embedding_memory", self.embedding_memory)
        self.embedding_memory = self.embedding_memory.to(saved.dtype)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: IndicesTuple | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch with the memory, or of the batch alone during the warm-up.

        Args:
            embeddings, labels: shapes (N, embedding_size) and (N,), integer labels.
            indices_tuple: pairs or triplets of the batch, to add; not with ``enqueue_mask``.
            enqueue_mask: shape (N,), bool: the embeddings to store; the others are the queries. None: all are both.
        """
        if indices_tuple is not None and enqueue_mask is not None:
            raise InputError("indices_tuple and enqueue_mask exclude each other; give one of them")
        if labels is None:
            raise InputError("labels must be given: the memory keeps them with the embeddings")
        check_batch("embeddings", embeddings, "labels", labels, self.embedding_size, "embedding_size")
        is_mask = isinstance(enqueue_mask, Tensor) and enqueue_mask.dtype == torch.bool
        if enqueue_mask is not None and not (is_mask and enqueue_mask.shape == embeddings.shape[:1]):
            wanted = f"a bool tensor of shape ({len(embeddings)},), one value for each embedding"
            raise InputError(f"enqueue_mask must be {wanted}, got {kind_of(enqueue_mask)}")
        number = len(embeddings) if enqueue_mask is None else int(enqueue_mask.sum())
        if number > self.memory_size:
            raise InputError(f"{number} embeddings do not fit in a memory_size of {self.memory_size}; make it larger")
        labels = labels.to(embeddings.device, torch.long)
        if self.warmup_calls >= self.warmup:
            self.embedding_memory = self.embedding_memory.to(embeddings)  # PML's does not convert it under autocast.
            return super().forward(embeddings, labels, indices_tuple, enqueue_mask)  # type: ignore[no-any-return]
        self.warmup_calls += 1
        self.curr_batch_idx = torch.arange(len(embeddings), device=embeddings.device)
        refs = embeddings, labels
        if enqueue_mask is not None:  # Without the memory the references are what the batch would store.
            refs = embeddings[enqueue_mask].detach(), labels[enqueue_mask]
            embeddings, labels = embeddings[~enqueue_mask], labels[~enqueue_mask]
        indices = self.create_indices_tuple(embeddings, labels, *refs, indices_tuple, enqueue_mask is None)
        return self.loss(embeddings, labels, indices, *refs)  # type: ignore[no-any-return]

    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        if batch_size > 0:
            super().add_to_memory(embeddings, labels, batch_size)
        else:  # PML would take the memory for filled.
            self.curr_batch_idx = torch.empty(0, dtype=torch.long, device=labels.device)

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
        indices = self._mine(embeddings, labels, E_mem, L_mem, own)
        if input_indices_tuple is None:
            return indices
        convert = lmu.convert_to_triplets if len(indices) == 3 else lmu.convert_to_pairs
        given = convert(self._in_memory(input_indices_tuple), labels)
        return c_f.concatenate_indices_tuples(indices, given)  # type: ignore[no-any-return]

    def _mine(self, x: Tensor, labels: Tensor, refs: Tensor, ref_labels: Tensor, own: Tensor | None) -> IndicesTuple:
        """The pairs of the miner, or all, without those of a query and itself, its candidate ``own``."""
        miner = self.miner
        if isinstance(miner, RankingMiner):
            return miner(x, labels, refs, ref_labels, own)  # type: ignore[no-any-return]
        takes_easiest = isinstance(miner, BatchEasyHardMiner) and miner.pos_strategy == "easy"
        if own is not None and takes_easiest and miner.allowed_pos_range is None:
            given = f'{type(miner).__name__} has pos_strategy="easy", and the easiest positive of a query is itself'
            raise InputError(f'{given}; give it pos_strategy="hard", or give a pml_drsl.miners.RankViolationMiner')
        indices = miner(x, labels, refs, ref_labels) if miner else lmu.get_all_pairs_indices(labels, ref_labels)
        if own is None:
            return indices  # type: ignore[no-any-return]
        keep = own[indices[0]] != indices[1]
        number = 3 if len(indices) == 3 else 2
        return (*(index[keep] for index in indices[:number]), *indices[number:])

    def _in_memory(self, indices: IndicesTuple) -> IndicesTuple:
        """Indices of the batch, with positives and negatives as indices of the memory. Anchors stay."""
        batch, mapped = self.curr_batch_idx, []
        for place, index in enumerate(indices):
            index = torch.as_tensor(index, dtype=torch.long, device=batch.device)
            low, high = (int(index.min()), int(index.max())) if len(index) else (0, 0)
            if len(index) and not 0 <= low <= high < len(batch):
                given = f"indices from {low} to {high}, outside the batch of {len(batch)} embeddings"
                cure = "give the pairs of the batch, or give the miner to CrossBatchMemory"
                raise InputError(f"indices_tuple has {given}; {cure}")
            is_anchor = place == 0 or (place == 2 and len(indices) == 4)
            mapped.append(index if is_anchor else batch[index])
        return tuple(mapped)  # type: ignore[return-value]


def _place(state: Tensor | dict[str, int]) -> list[int]:
    # Some of these versions have a dictionary.
    return [*map(int, state.values() if isinstance(state, dict) else state)]
