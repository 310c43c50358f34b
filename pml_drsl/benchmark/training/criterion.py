"""A loss with everything around it: its miner, its weights, a memory, and cross-entropy beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pml_drsl.benchmark.training.candidates import CANDIDATES, Classifier
from pml_drsl.miners import FourIndices, NegativeBudgetMiner
from pml_drsl.wrappers import CrossBatchMemory


class Criterion(nn.Module):
    """What a network is trained with.

    Args:
        loss: name of a loss in ``CANDIDATES``.
        parameters: parameters of the loss, of its miner (``epsilon``), and the learning rate ``lr`` of its weights.
        identities: training identities.
        dim: size of the embedding.
        cross_entropy: weight of the cross-entropy of a linear classifier added to the loss; 0 leaves it out.
        memory: size of a cross-batch memory around the loss; 0 for none.
        warmup: steps before the memory starts.
        negatives_per_positive: if above 0, every query has one positive, and so many negatives, drawn at random.
        seed: of those draws.
    """

    def __init__(
        self,
        loss: str,
        parameters: dict[str, Any],
        identities: int,
        dim: int,
        *,
        cross_entropy: float = 0.0,
        memory: int = 0,
        warmup: int = 0,
        negatives_per_positive: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        candidate = CANDIDATES[loss]
        parameters = dict(parameters)
        self.lr: float | None = parameters.pop("lr", candidate.lr)
        mining = {"epsilon": parameters.pop("epsilon")} if "epsilon" in parameters else {}
        if candidate.has_weights:
            parameters.update(num_classes=identities, embedding_size=dim)
        self.loss = candidate.make(**parameters)
        self.miner = None if candidate.miner is None else candidate.miner(**mining)
        if negatives_per_positive:
            self.miner = _OnePositive(negatives_per_positive, "random", seed=seed)
        self.in_memory = memory > 0
        if self.in_memory:
            self.loss = CrossBatchMemory(self.loss, dim, memory, self.miner, warmup)
        self.weight = cross_entropy
        self.cross_entropy = Classifier(identities, dim) if self.weight else None

    def groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: the weights of the loss have their own learning rate, if they have one,
        and the classifier has ``lr`` and ``weight_decay``, as the network has."""
        groups = [
            {"params": list(self.loss.parameters()), "lr": self.lr or lr, "weight_decay": 0.0},
            {
                "params": list(self.cross_entropy.parameters()) if self.cross_entropy is not None else [],
                "lr": lr,
                "weight_decay": weight_decay,
            },
        ]
        return [group for group in groups if group["params"]]

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self.in_memory or self.miner is None:
            loss: Tensor = self.loss(embeddings, labels)
        else:
            loss = self.loss(embeddings, labels, self.miner(embeddings, labels))
        if self.cross_entropy is not None:
            loss = loss + self.weight * self.cross_entropy(embeddings, labels)
        return loss


class _OnePositive(NegativeBudgetMiner):
    """``NegativeBudgetMiner`` for queries with one positive each, drawn at random.

    With more positives, and a memory that holds all identities alike, no ratio could exceed the number of identities.
    """

    def select(self, embeddings: Tensor, ref_emb: Tensor, positives: Tensor, negatives: Tensor) -> FourIndices:
        cost = self._random(len(embeddings), len(ref_emb), embeddings.device).masked_fill(~positives, torch.inf)
        one = torch.zeros_like(positives).scatter_(1, cost.argmin(1, keepdim=True), True)
        return super().select(embeddings, ref_emb, positives & one, negatives)
