"""Training steps with torchreid's own losses, whose engines run their optimizer themselves, as ``BaseEngine`` asks."""

from __future__ import annotations

from typing import Any

import torchreid

from pml_drsl.wrappers import gather_batch
from torchreid_ext.data.samplers import warn_of_chance
from torchreid_ext.engine.base import BaseEngine


class SoftmaxStep(BaseEngine):
    """The step of torchreid's softmax engines."""

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        images, pids = self.training_batch(data)
        logits = self.forward(images)
        weight = self.mean_weight(pids)
        loss = self.compute_loss(self.criterion, logits, pids) * weight
        self.step(loss)
        return {"loss": loss.item(), "acc": torchreid.metrics.accuracy(logits, pids)[0].item() * weight}


class TripletStep(BaseEngine):
    """The step of torchreid's triplet engines."""

    def __init__(self, datamanager: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(datamanager, *args, **kwargs)
        if self.weight_t > 0:
            warn_of_chance(datamanager.train_loader, "the triplet loss")

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        images, pids = self.training_batch(data)
        logits, features = self.forward(images)
        loss: Any = 0
        summary = {}
        if self.weight_t > 0:
            # The hardest of the whole batch, as in one process.
            every = [gather_batch(x, pids) for x in (features if isinstance(features, (list, tuple)) else [features])]
            loss_t = self.compute_loss(self.criterion_t, [x for x, _ in every], every[0][1])
            loss = loss + self.weight_t * loss_t
            summary["loss_t"] = loss_t.item()
        if self.weight_x > 0:
            weight = self.mean_weight(pids)
            loss_x = self.compute_loss(self.criterion_x, logits, pids) * weight
            loss = loss + self.weight_x * loss_x
            summary |= {"loss_x": loss_x.item(), "acc": torchreid.metrics.accuracy(logits, pids)[0].item() * weight}
        self.step(loss)
        return summary
