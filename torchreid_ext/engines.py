"""torchreid's engines with DRSL, or any loss of pytorch-metric-learning, among their losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchreid
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn
from torch.optim import Optimizer

from pml_drsl.losses import DRSLoss
from torchreid_ext.base_engine import BaseEngine
from torchreid_ext.host_steps import SoftmaxStep, TripletStep


class ImageSoftmaxEngine(SoftmaxStep, torchreid.engine.ImageSoftmaxEngine):
    """torchreid's own, with this package's checkpoints, evaluation and checks."""


class VideoSoftmaxEngine(SoftmaxStep, torchreid.engine.VideoSoftmaxEngine):
    """torchreid's own, with this package's checkpoints, evaluation and checks."""


class ImageTripletEngine(TripletStep, torchreid.engine.ImageTripletEngine):
    """torchreid's own, with this package's checkpoints, evaluation and checks."""


class VideoTripletEngine(TripletStep, torchreid.engine.VideoTripletEngine):
    """torchreid's own, with this package's checkpoints, evaluation and checks."""


class ImageDRSLEngine(BaseEngine):
    """Trains with a loss of pytorch-metric-learning on the features and cross-entropy on the identity logits.

    A model that returns several features or logits in training (``pcb_p6``, ``hacnn``) is trained on the mean of
    their losses. What is logged: ``loss_m``, ``loss_x``, ``acc`` (of the first logits, in percent), and the
    statistics of a criterion that has ``collect_stats``.

    Args:
        datamanager: a data manager of torchreid.
        model: a network of torchreid built with ``loss="triplet"``, or any that returns ``(logits, features)`` in
            training and features otherwise.
        optimizer: of the model's parameters.
        criterion: a loss of pytorch-metric-learning; default ``DRSLoss()``.
        weight_m: weight of the criterion, >= 0.
        weight_x: weight of the cross-entropy, >= 0; not both 0.
        miner: a miner of pytorch-metric-learning, applied to the features.
        scheduler: a learning rate scheduler, stepped each epoch; None keeps the rate.
        use_gpu: evaluate on CUDA where there is a device. Training is where the model is.
        label_smooth: smooth the labels of the cross-entropy by 0.1.

    Raises:
        ValueError: for a weight below 0, a criterion or miner that is not PML's, or a model that does not return
            what the weights need.
    """

    def __init__(
        self,
        datamanager: Any,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: BaseMetricLossFunction | None = None,
        weight_m: float = 1,
        weight_x: float = 1,
        miner: BaseMiner | None = None,
        scheduler: Any = None,
        use_gpu: bool = True,
        label_smooth: bool = True,
    ) -> None:
        super().__init__(datamanager, use_gpu)
        if weight_m < 0 or weight_x < 0 or weight_m + weight_x == 0:
            raise ValueError(f"weight_m and weight_x must be 0 or more and not both 0, got {weight_m} and {weight_x}")
        self.criterion = DRSLoss(collect_stats=True) if criterion is None else criterion
        if not callable(getattr(self.criterion, "forward", None)):
            raise ValueError(f"criterion must be a loss of pytorch_metric_learning, got {criterion!r}")
        if miner is not None and not isinstance(miner, BaseMiner):
            raise ValueError(f"miner must be a miner of pytorch_metric_learning, got {miner!r}")
        if weight_m > 0:
            check_returns_features(model)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.register_model("model", model, optimizer, scheduler)
        self.weight_m, self.weight_x, self.miner = weight_m, weight_x, miner
        self.cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.1 if label_smooth else 0)

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        images, pids = self.training_batch(data)
        logits, features = self._split(self.forward(images))

        loss: Tensor | float = 0
        summary = {}
        if self.weight_m > 0:
            loss_m = _mean_over(features, lambda f: self._metric_loss(f, pids))
            loss = loss + self.weight_m * loss_m
            summary["loss_m"] = loss_m.item()
            summary |= self._criterion_stats()
        if self.weight_x > 0:
            loss_x = _mean_over(logits, lambda y: self.cross_entropy(y, pids))
            loss = loss + self.weight_x * loss_x
            summary["loss_x"] = loss_x.item()
            summary["acc"] = torchreid.metrics.accuracy(logits[0], pids)[0].item()
        assert isinstance(loss, Tensor)
        self.step(loss)
        return summary

    def _split(self, output: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The logits and the features of a training output."""
        if self.weight_m == 0 and isinstance(output, Tensor):
            return [output], []
        if not isinstance(output, (tuple, list)) or len(output) != 2:
            raise ValueError(
                f"the model must return (logits, features) in training, got {type(output).__name__}; "
                f"build a model of torchreid with loss='triplet'"
            )
        logits, features = (list(part) if isinstance(part, (tuple, list)) else [part] for part in output)
        num_pids = self.datamanager.num_train_pids
        for y in logits:
            if y.ndim != 2 or y.shape[1] < num_pids:
                raise ValueError(
                    f"the model's logits have shape {tuple(y.shape)}, but there are {num_pids} training identities; "
                    f"build it with num_classes={num_pids}"
                )
        return logits, features

    def _metric_loss(self, features: Tensor, pids: Tensor) -> Tensor:
        return self.criterion(features, pids, None if self.miner is None else self.miner(features, pids))

    def _criterion_stats(self) -> dict[str, float]:
        if not getattr(self.criterion, "collect_stats", False):
            return {}
        return {name: float(getattr(self.criterion, name)) for name in self.criterion._record_these_stats}


class VideoDRSLEngine(ImageDRSLEngine):
    """``ImageDRSLEngine`` for tracklets: trained on their images, tested on their pooled features, as torchreid's.

    Args:
        pooling_method: ``"avg"`` or ``"max"``.
    """

    def __init__(self, *args: Any, pooling_method: str = "avg", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if pooling_method not in ("avg", "max"):
            raise ValueError(f"pooling_method must be 'avg' or 'max', got {pooling_method!r}")
        self.pooling_method = pooling_method

    parse_data_for_train = torchreid.engine.VideoSoftmaxEngine.parse_data_for_train
    extract_features = torchreid.engine.VideoSoftmaxEngine.extract_features


def check_returns_features(model: nn.Module) -> None:
    """Refuses a model of torchreid's zoo that was built for another loss.

    Such a model returns logits alone, or, with two heads, two logits that look like logits and features.

    Raises:
        ValueError: saying how to build it.
    """
    built_for = getattr(model.module if isinstance(model, nn.DataParallel) else model, "loss", "triplet")
    if built_for != "triplet":
        raise ValueError(
            f"the model was built with loss={built_for!r} and returns no features in training; build it with "
            f"torchreid.models.build_model(..., loss='triplet')"
        )


def _mean_over(outputs: list[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of a loss over the outputs of a model with several heads."""
    return torch.stack([loss(output) for output in outputs]).mean()
