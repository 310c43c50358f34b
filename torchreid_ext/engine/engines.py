"""The engines: any loss of the features, the cross-entropy of the logits, or the sum of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchreid
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn
from torch.optim import Optimizer

from pml_drsl.checks import InputError
from pml_drsl.distributed import DistributedLossWrapper, draws_of_first, gather_batch
from pml_drsl.losses import DRSLoss
from torchreid_ext import networks
from torchreid_ext.data.samplers import warn_if_positives_are_rare
from torchreid_ext.engine import criteria
from torchreid_ext.engine.base import BaseEngine
from torchreid_ext.engine.step import Batch, Tracklets
from torchreid_ext.runtime import distributed


class ImagePMLEngine(BaseEngine):
    """Trains with a loss of pytorch-metric-learning (PML) on the features and cross-entropy on the identity logits,
    which may also stand alone.

    In a run of several processes, each has its share of the batch, and the criterion and the miner see the whole batch.
    A model that returns several features or logits in training (``pcb_p6``, ``hacnn``) is trained on the mean of their
    losses. The log shows ``loss_m``, ``loss_x``, ``acc`` (accuracy of the first logits in percent), and the statistics
    of a criterion that has ``collect_stats``. Raises InputError for a weight below 0, for a criterion, miner and
    optimizer that do not fit together, or for a model that does not return what the weights need.

    Example::

        import torchreid
        import torchreid_ext
        from pytorch_metric_learning.losses import MultiSimilarityLoss

        datamanager = torchreid.data.ImageDataManager(
            root="reid-data", sources="market1501", train_sampler="RandomIdentitySampler", batch_size_train=64
        )
        model = torchreid.models.build_model("osnet_x1_0", datamanager.num_train_pids, loss="triplet")
        optimizer = torchreid.optim.build_optimizer(model, lr=0.0015)
        engine = torchreid_ext.ImagePMLEngine(datamanager, model, optimizer, MultiSimilarityLoss())
        results = engine.run(max_epoch=60, save_dir="log/osnet", dist_metric="cosine")

    Args:
        datamanager: a data manager of torchreid.
        model: a network of torchreid built with ``loss="triplet"``, or any network that returns ``(logits, features)``
            in training and features otherwise.
        optimizer: an optimizer of the parameters of the model, and of the criterion if the criterion has parameters.
        criterion: a loss of PML, or any other that takes features and identities, such as torchreid's ``TripletLoss``;
            a ``PerFeature`` has one for each of the model's features. It may be None where ``weight_m`` is 0.
        weight_m: weight of the criterion, >= 0; None: 1, or 0.3 in the engines of DRSL.
        weight_x: weight of the cross-entropy, >= 0; one of the two weights is above 0.
        miner: a miner of PML, applied to the features. A ``CrossBatchMemory`` takes its miner itself.
        scheduler: a learning rate scheduler, stepped after each epoch; None keeps the rate.
        use_gpu: kept for torchreid's signature; training and tests take place on the device of the model.
        label_smooth: smooth the labels of the cross-entropy by 0.1.
        cross_camera: leave pairs of one identity and one camera out, as evaluation does; a miner's choice too.
    """

    by_default: Callable[[], nn.Module] | None = None  # makes the criterion of a subclass that needs none
    weight_by_default = 1.0

    def __init__(
        self, datamanager: Any, model: nn.Module, optimizer: Optimizer, criterion: Any = None,
        weight_m: float | None = None, weight_x: float = 1, miner: BaseMiner | None = None, scheduler: Any = None,
        use_gpu: bool = True, label_smooth: bool = True, cross_camera: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(datamanager, use_gpu)
        weight_m = self.weight_by_default if weight_m is None else weight_m
        if weight_m < 0 or weight_x < 0 or weight_m + weight_x == 0:
            raise InputError(f"weight_m and weight_x must be 0 or more and not both 0, got {weight_m} and {weight_x}")
        if miner is not None and not isinstance(miner, BaseMiner):
            raise InputError(f"miner must be a miner of pytorch_metric_learning, got {miner!r}")
        if criterion is None and self.by_default is not None:
            criterion = self.by_default()
        if criterion is not None or weight_m > 0:
            criteria.check_criterion(criterion, optimizer, miner, cross_camera)
        if weight_m > 0:
            criteria.check_returns_features(model)
            if comparing := criteria.loss_that_compares_images(criterion):
                warn_if_positives_are_rare(datamanager.train_loader, comparing)
        self.criterion = criterion
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.register_model("model", model, optimizer, scheduler)
        self.weight_m, self.weight_x, self.miner, self.cross_camera = weight_m, weight_x, miner, cross_camera
        self.cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.1 if label_smooth else 0)

    def _prepare(self) -> None:
        raw = self.options.dist_metric == "euclidean" and not self.options.normalize_feature
        if raw and self.weight_m > 0 and criteria.compares_directions(self.criterion) and distributed.is_first():
            different = "the loss scales features to unit norm, and the test by Euclidean distances does not"
            warnings.warn(f"{different}: dist_metric='cosine' (test.dist_metric) suits the loss", stacklevel=3)
        super()._prepare()

    def compute_losses(self, output: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        logits, features = self._split(output)
        loss, summary = torch.zeros((), device=batch.pids.device), dict[str, float]()
        if self.weight_m > 0:
            if self.cross_camera and batch.camids is None:
                raise InputError("cross_camera needs the camera of each image, and the loader gives no 'camid'")
            loss_m = self._metric_loss(features, batch.pids, batch.camids if self.cross_camera else None)
            loss = loss + self.weight_m * loss_m
            summary |= {"loss_m": loss_m.item(), **self._criterion_stats()}
        if self.weight_x > 0:
            scale = distributed.local_mean_scale(len(batch.pids), batch.pids.device)
            loss_x = scale * torch.stack([self.cross_entropy(y, batch.pids) for y in logits]).mean()
            loss = loss + self.weight_x * loss_x
            accuracy = torchreid.metrics.accuracy(logits, batch.pids)[0].item()
            summary |= {"loss_x": loss_x.item(), "acc": scale * accuracy}
        return loss, summary

    def _split(self, output: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The logits and the features of each head."""
        # A network that was built for softmax returns logits alone, with two heads a pair of them.
        built_for = getattr(distributed.unwrapped(self.model), "loss", "")
        alone = self.weight_m == 0 and (isinstance(output, Tensor) or built_for == "softmax")
        logits, features = networks.heads((output, []) if alone else output)
        num_pids = self.datamanager.num_train_pids
        for y in logits if self.weight_x > 0 else []:
            if y.ndim != 2 or y.shape[1] < num_pids:
                few = f"the model's logits have shape {tuple(y.shape)}, but there are {num_pids} training identities"
                raise InputError(f"{few}; build it with num_classes={num_pids}")
        return logits, features

    def _metric_loss(self, features: list[Tensor], pids: Tensor, camids: Tensor | None) -> Tensor:
        """The mean of the criterion over the features of a model with several heads."""
        has_several = isinstance(self.criterion, criteria.PerFeature)
        of_features = self.criterion if has_several else [self.criterion] * len(features)
        losses = []
        for criterion, x in zip(of_features, features, strict=True):
            pairs = self._pairs(x, pids, camids)
            if distributed.size() > 1 and isinstance(criterion, DRSLoss):
                losses.append(DistributedLossWrapper(criterion, efficient=True)(x, pids, pairs))
                continue
            with draws_of_first(pids.device):
                losses.append(criterion(*gather_batch(x, pids), *([] if pairs is None else [pairs])))
        return torch.stack(losses).mean()

    def _pairs(self, features: Tensor, pids: Tensor, camids: Tensor | None) -> Any:
        """The chosen pairs or triplets of the whole batch; None for all pairs."""
        if self.miner is None and camids is None:
            return None
        features, pids = gather_batch(features.detach(), pids)
        with draws_of_first(pids.device):
            mined = None if self.miner is None else self.miner(features, pids)
        if camids is None:
            return mined
        (camids,) = gather_batch(camids)
        return criteria.cross_camera_pairs(pids, camids, mined)

    def _criterion_stats(self) -> dict[str, float]:
        for part in self.criterion.modules():
            # Not every loss has statistics to collect.
            if isinstance(part, BaseMetricLossFunction) and part.collect_stats and hasattr(part, "_record_these_stats"):
                return {name: float(getattr(part, name)) for name in part._record_these_stats}
        return {}


class VideoPMLEngine(Tracklets, ImagePMLEngine):
    """``ImagePMLEngine`` for tracklets: it trains on their frames and tests on their pooled features. It has one more
    argument, ``pooling_method``: ``"avg"`` or ``"max"``."""


class ImageDRSLEngine(ImagePMLEngine):
    """``ImagePMLEngine`` with two other defaults: the criterion ``DRSLoss()``, and a ``weight_m`` of 0.3.

    Example::

        engine = torchreid_ext.ImageDRSLEngine(datamanager, model, optimizer)
        results = engine.run(max_epoch=60, save_dir="log/osnet", dist_metric="cosine")
    """

    by_default = staticmethod(partial(DRSLoss, collect_stats=True))
    weight_by_default = 0.3


class VideoDRSLEngine(Tracklets, ImageDRSLEngine):
    """``VideoPMLEngine`` with the defaults of ``ImageDRSLEngine``."""


ENGINES = {"image": (ImagePMLEngine, ImageDRSLEngine), "video": (VideoPMLEngine, VideoDRSLEngine)}
"""The engine of any loss and that of DRSL, by ``data.type``."""
