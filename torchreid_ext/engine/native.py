"""torchreid's own softmax and triplet engines, with the checkpoints, the evaluation and the checks of this package."""

from __future__ import annotations

from typing import Any

import torch
import torchreid
from torch import Tensor

from pml_drsl.distributed import gather_batch
from torchreid_ext.data.samplers import warn_if_positives_are_rare
from torchreid_ext.engine.base import BaseEngine
from torchreid_ext.engine.batch import Batch
from torchreid_ext.engine.video import Tracklets


class SoftmaxStep(BaseEngine):
    """Mixed into torchreid's softmax engines: the cross-entropy of the logits."""

    def compute_losses(self, output: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        scale = self.local_mean_scale(batch.pids)
        loss = self.compute_loss(self.criterion, output, batch.pids) * scale
        return loss, {"loss": loss.item(), "acc": torchreid.metrics.accuracy(output, batch.pids)[0].item() * scale}


class TripletStep(BaseEngine):
    """Mixed into torchreid's triplet engines: the triplet loss of the features and the cross-entropy of the logits."""

    def __init__(self, datamanager: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(datamanager, *args, **kwargs)
        if self.weight_t > 0:
            warn_if_positives_are_rare(datamanager.train_loader, "the triplet loss")

    def compute_losses(self, output: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        logits, features = output
        terms: list[Tensor] = []
        summary: dict[str, float] = {}
        if self.weight_t > 0:
            # The hardest triplets are chosen from the whole batch, as in one process.
            heads = features if isinstance(features, (list, tuple)) else [features]
            gathered = [gather_batch(head, batch.pids) for head in heads]
            loss_t = self.compute_loss(self.criterion_t, [head for head, _ in gathered], gathered[0][1])
            terms.append(self.weight_t * loss_t)
            summary["loss_t"] = loss_t.item()
        if self.weight_x > 0:
            scale = self.local_mean_scale(batch.pids)
            loss_x = self.compute_loss(self.criterion_x, logits, batch.pids) * scale
            terms.append(self.weight_x * loss_x)
            accuracy = torchreid.metrics.accuracy(logits, batch.pids)[0].item()
            summary |= {"loss_x": loss_x.item(), "acc": accuracy * scale}
        return torch.stack(terms).sum(), summary


class ImageSoftmaxEngine(SoftmaxStep, torchreid.engine.ImageSoftmaxEngine):
    """torchreid's engine of this name on top of ``BaseEngine``."""


class VideoSoftmaxEngine(Tracklets, SoftmaxStep, torchreid.engine.VideoSoftmaxEngine):
    """torchreid's engine of this name on top of ``BaseEngine``."""


class ImageTripletEngine(TripletStep, torchreid.engine.ImageTripletEngine):
    """torchreid's engine of this name on top of ``BaseEngine``."""


class VideoTripletEngine(Tracklets, TripletStep, torchreid.engine.VideoTripletEngine):
    """torchreid's engine of this name on top of ``BaseEngine``."""
