"""One training run of the quality benchmark: everything that decides its result, and the run itself."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import Tensor, nn
from torch.nn import functional as F

from pml_drsl.benchmark.training.candidates import Criterion
from pml_drsl.benchmark.training.images import Data, Images
from pml_drsl.evaluation.accuracy import evaluate

PRECISIONS = ("float32", "bfloat16")
CMC_RANKS = (1, 5, 10)
TEST_BATCH = 256


@dataclass(frozen=True)
class Trial:
    """What decides the result of a run; two runs of equal trials on one machine give equal numbers.

    Attributes:
        data: ``Data.name``.
        split: ``"validation"`` or ``"test"``.
        loss: name in ``candidates.CANDIDATES``.
        parameters: of the loss.
        cross_entropy: weight of cross-entropy of a linear classifier added to the loss; 0 leaves it out.
        memory: size of a cross-batch memory around the loss; 0 for none.
        negatives_per_positive: budget of a ``NegativeBudgetMiner`` (random) around the loss; 0 for none.
        identities: identities in a batch, or as many as there are.
        instances: images of each; with fewer of them, some are drawn twice.
        epochs: times the training set is shown.
        lr: learning rate of the network; Adam, falling to 0 along a cosine.
        seed: of the network, the order of the data, and the augmentation.
        network: ``"conv4"``, or the name of a torchreid model.
        dim: size of conv4's embedding.
        mirror: mirror half of the images.
        precision: of the convolutions: ``"float32"`` or ``"bfloat16"``; embeddings and loss are float32.
    """

    data: str
    split: str
    loss: str
    parameters: dict[str, Any] = field(default_factory=dict)
    cross_entropy: float = 0.0
    memory: int = 0
    negatives_per_positive: float = 0.0
    identities: int = 16
    instances: int = 4
    epochs: int = 40
    lr: float = 2e-3
    seed: int = 0
    network: str = "conv4"
    dim: int = 128
    mirror: bool = False
    precision: str = "float32"

    @property
    def key(self) -> str:
        """The trial as text, by which a results file knows it."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def but(self, **changes: Any) -> Trial:
        return dataclasses.replace(self, **changes)


def run(trial: Trial, data: Data, device: str, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Trains and tests; returns the scores in [0, 1]. Calls ``advance`` after every epoch.

    Raises:
        FloatingPointError: for a loss that is not finite.
    """
    train, test = data.split(trial.split)
    trainer = Trainer(trial, train, device)
    for epoch in range(trial.epochs):
        trainer.epoch(epoch)
        advance()
    return scores(trainer.embed(test), test)


class Trainer:
    """A network, its criterion and the optimizer of both."""

    def __init__(self, trial: Trial, train: Images, device: str) -> None:
        self.trial, self.device = trial, device
        # Drawn before anything else and to the end, so that no loss has a part in the order of the data.
        self.batches = _batches(trial, train.labels)
        self.augmentation = torch.Generator().manual_seed(trial.seed)
        torch.manual_seed(trial.seed)
        channels, height, width = train.pixels.shape[1:]
        self.network = make_network(trial, channels, height, width, train.identities).to(device)
        with torch.no_grad():
            dim = self.network.eval()(torch.zeros(1, channels, height, width, device=device)).shape[1]
        self.criterion = Criterion(trial, train.identities, dim).to(device)
        groups = [
            {"params": list(self.network.parameters()), "lr": trial.lr},
            {"params": list(self.criterion.parameters()), "lr": self.criterion.lr or trial.lr},
        ]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
        steps = sum(map(len, self.batches))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, steps))
        self.pixels, self.labels = train.pixels, train.labels
        pixels = train.pixels.float()
        self.mean, self.std = pixels.mean((0, 2, 3))[:, None, None], pixels.std((0, 2, 3))[:, None, None]

    def epoch(self, epoch: int, steps: int | None = None) -> None:
        """All steps of an epoch, or the first ``steps``."""
        self.network.train()
        for indices in self.batches[epoch][:steps]:
            self.step(indices)

    def step(self, indices: Tensor) -> None:
        x = augmented(self._scaled(self.pixels[indices]), self.trial.mirror, self.augmentation)
        loss = self.criterion(self._embeddings(x.to(self.device)), self.labels[indices].to(self.device))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()

    def _scaled(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std

    def _embeddings(self, x: Tensor) -> Tensor:
        return self.network(x.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]

    @torch.no_grad()
    def embed(self, images: Images) -> Tensor:
        """Embeddings, on the CPU, shape (N, dim)."""
        self.network.eval()
        parts = images.pixels.split(TEST_BATCH)
        return torch.cat([self._embeddings(self._scaled(part).to(self.device)).float().cpu() for part in parts])


def _batches(trial: Trial, labels: Tensor) -> list[list[Tensor]]:
    """Indices of every batch of every epoch."""
    identities = min(trial.identities, int(labels.max()) + 1)
    size = identities * trial.instances
    # Of a set smaller than a batch an epoch is one batch.
    sampler = MPerClassSampler(labels, trial.instances, size, length_before_new_iter=max(size, len(labels)))
    np.random.seed(trial.seed)  # what the sampler draws from
    return [list(torch.tensor(list(sampler)).split(size)) for _ in range(trial.epochs)]


class _Conv4(nn.Module):
    """Four blocks of 3 x 3 convolution with stride 2, normalisation and ReLU, 64 wide, and a linear layer: the network
    for Omniglot of Finn et al., "Model-Agnostic Meta-Learning", ICML 2017."""

    def __init__(self, channels: int, height: int, width: int, dim: int, precision: str) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for into in (channels, 64, 64, 64):
            blocks += [nn.Conv2d(into, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks, nn.Flatten())
        self.embedding = nn.Linear(64 * math.ceil(height / 16) * math.ceil(width / 16), dim)
        self.in_bfloat16 = precision == "bfloat16"

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            x = self.blocks(x)
        return self.embedding(x.float())  # type: ignore[no-any-return]


class _Features(nn.Module):
    """A torchreid model that gives features in training too."""

    def __init__(self, name: str, identities: int, precision: str) -> None:
        super().__init__()
        import torchreid

        self.model = torchreid.models.build_model(name, identities, loss="triplet", pretrained=False)
        self.in_bfloat16 = precision == "bfloat16"

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            found = self.model(x)
        features: Tensor = found[1] if isinstance(found, tuple) else found
        return features.float()


def make_network(trial: Trial, channels: int, height: int, width: int, identities: int) -> nn.Module:
    if trial.network == "conv4":
        network: nn.Module = _Conv4(channels, height, width, trial.dim, trial.precision)
    else:
        network = _Features(trial.network, identities, trial.precision)
    return network.to(memory_format=torch.channels_last)


def augmented(x: Tensor, mirror: bool, generator: torch.Generator) -> Tensor:
    """Each image turned (by up to 22.5 degrees), stretched (30 %), sheared (0.3) and shifted (22 % of half its size).

    As strong as did best beside cross-entropy, on Omniglot's validation identities.
    """

    def draw(largest: float) -> Tensor:
        return (2 * torch.rand(len(x), generator=generator) - 1) * largest

    angle, wide, high, shear = draw(math.pi / 8), 1 + draw(0.3), 1 + draw(0.3), draw(0.3)
    right, down = draw(0.22), draw(0.22)
    if mirror:
        wide = wide * torch.where(draw(1) < 0, -1, 1)
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * wide, (shear * cos - sin) * high, right], 1),
        torch.stack([sin * wide, (shear * sin + cos) * high, down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def scores(embeddings: Tensor, images: Images) -> dict[str, Any]:
    """Precision@1 and MAP@R as pytorch-metric-learning has them, mAP and CMC as in re-identification.

    Without cameras every image is searched for in all others; with cameras mAP and CMC leave out what is of the
    query's own camera. The angle ranks, as every loss here normalises embeddings.
    """
    embeddings = F.normalize(embeddings)
    labels, queries = images.labels, images.queries
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count", device=torch.device("cpu")
    )
    if queries is None:
        found = calculator.get_accuracy(embeddings, labels)
        # Each image its own camera: that leaves out the image itself, and nothing else.
        cameras = torch.arange(len(labels))
        query = gallery = torch.ones_like(labels, dtype=torch.bool)
    else:
        assert images.cameras is not None
        cameras, query, gallery = images.cameras, queries, ~queries
        found = calculator.get_accuracy(embeddings[query], labels[query], embeddings[gallery], labels[gallery], False)
    ranked = evaluate(
        embeddings[query], embeddings[gallery], labels[query], labels[gallery], cameras[query], cameras[gallery]
    )
    return {
        "P@1": found["precision_at_1"],
        "MAP@R": found["mean_average_precision_at_r"],
        "mAP": ranked.mAP,
        **{f"rank-{k}": ranked.rank(min(k, ranked.num_gallery)) for k in CMC_RANKS},
    }
