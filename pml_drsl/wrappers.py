"""pytorch-metric-learning's wrappers CrossBatchMemory and SelfSupervisedLoss, for ``DRSLoss`` too.

PML admits losses to these wrappers by class name. The subclasses here admit one more.
"""

from __future__ import annotations

from pytorch_metric_learning import losses
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_drsl.checks import InputError
from pml_drsl.distributed import DistributedLossWrapper, DistributedMinerWrapper
from pml_drsl.losses import DRSLoss
from pml_drsl.miners import mine_without_self, without_self
from pml_drsl.pairs import IndicesTuple

__all__ = ["CrossBatchMemory", "DistributedLossWrapper", "DistributedMinerWrapper", "SelfSupervisedLoss"]


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
            indices = mine_without_self(self.miner, embeddings, labels, E_mem, L_mem, own)
        else:
            indices = without_self(lmu.get_all_pairs_indices(labels, L_mem), own)
        given = input_indices_tuple
        if given is None:
            return indices
        if len(given) < len(indices):
            given = lmu.convert_to_pairs(given, labels)
        elif len(given) > len(indices):
            given = lmu.convert_to_triplets(given, labels)
        return c_f.concatenate_indices_tuples(indices, given)  # type: ignore[no-any-return]
