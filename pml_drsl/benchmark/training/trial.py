"""One training run of the benchmark: everything that decides its result, and the run itself."""

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
from torch import Tensor

from pml_drsl.benchmark.training.criterion import Criterion
from pml_drsl.benchmark.training.images import TEST, Images
from pml_drsl.benchmark.training.networks import Recipe, augmented, embedding_size, make_network
from pml_drsl.benchmark.training.scoring import score
from pml_drsl.benchmark.training.sets import BenchmarkSet

TEST_BATCH = 256
# Of ImageNet's images, in units of a pixel: what starting weights were trained with.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Trial:
    """What decides the result of a run; two runs of equal trials on one machine give equal numbers.

    Attributes:
        set: name of the data set, whose recipe is in the results file.
        split: ``"test"``, or a fold of validation; see ``Data.split``.
        loss: name of a loss in ``candidates.CANDIDATES``.
        parameters: of the loss; see ``Criterion``, also for the next three.
        cross_entropy: weight of cross-entropy beside the loss.
        memory: size of a cross-batch memory, which starts after the warm-up of the learning rate, and after one epoch.
        negatives_per_positive: negatives of each query, with one positive; 0 for all of both.
        changes: fields of the set's recipe that differ.
        seed: of the network, the order of the data, the augmentation, and the draw of the test identities.
    """

    set: str
    split: str
    loss: str
    parameters: dict[str, Any] = field(default_factory=dict)
    cross_entropy: float = 0.0
    memory: int = 0
    negatives_per_positive: float = 0.0
    changes: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def key(self) -> str:
        """The trial as text, by which a results file knows it."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def but(self, **changes: Any) -> Trial:
        return dataclasses.replace(self, **changes)

    @property
    def any_seed(self) -> Trial:
        """The trial that stands for all seeds of this one."""
        return self.but(seed=0)


def run(trial: Trial, of_set: BenchmarkSet, device: str, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Trains and tests. Calls ``advance`` after every epoch.

    Returns:
        ``scores``, in [0, 1]; on the test also ``identities``, the set's score of each test identity.

    Raises:
        FloatingPointError: for a loss that is not finite.
    """
    train, test = of_set.data.split(trial.split, trial.seed)
    trainer = Trainer(trial, of_set, train, device)
    for epoch in range(trainer.recipe.epochs):
        trainer.epoch(epoch)
        advance()
    scores, of_identities = score(trainer.embed(test), test)
    return {"scores": scores, "identities": of_identities} if trial.split == TEST else {"scores": scores}


class Trainer:
    """A network, its criterion and the optimizer of both."""

    def __init__(self, trial: Trial, of_set: BenchmarkSet, train: Images, device: str) -> None:
        self.recipe = recipe = of_set.recipe.but(**trial.changes)
        self.device = device
        # Drawn before anything else and to the end, so that no loss has a part in the order of the data.
        self.batches = _batches(recipe, trial.seed, train.labels)
        self.augmentation = torch.Generator().manual_seed(trial.seed)
        torch.manual_seed(trial.seed)
        channels, height, width = shape = train.pixels.shape[1:]
        self.network = make_network(recipe, (channels, height, width), train.identities, of_set.weights).to(device)
        dim = embedding_size(self.network, (channels, height, width), device)
        self.criterion = Criterion(
            trial.loss,
            trial.parameters,
            train.identities,
            dim,
            cross_entropy=trial.cross_entropy,
            memory=trial.memory,
            warmup=sum(map(len, self.batches[: max(1, recipe.warmup)])),
            negatives_per_positive=trial.negatives_per_positive,
            seed=trial.seed,
        ).to(device)
        # A classifier of the zoo has no part in the loss, and would only be decayed.
        own = [weight for name, weight in self.network.named_parameters() if not name.startswith("model.classifier.")]
        network = {"params": own, "lr": recipe.lr, "weight_decay": recipe.weight_decay}
        self.optimizer = torch.optim.Adam([network, *self.criterion.groups(recipe.lr, recipe.weight_decay)], fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _rate(recipe, list(map(len, self.batches))))
        self.pixels, self.labels = train.pixels, train.labels
        self.mean, self.std = _statistics(train.pixels, from_imagenet=bool(recipe.weights) and shape[0] == 3)

    def epoch(self, epoch: int, steps: int | None = None) -> None:
        """All steps of an epoch, or the first ``steps``."""
        self.network.train()
        for indices in self.batches[epoch][:steps]:
            self.step(indices)

    def step(self, indices: Tensor) -> None:
        indices = indices.repeat_interleave(self.recipe.views)
        scaled = self._scaled(self.pixels[indices])
        x = augmented(scaled, self.recipe.augmentation, self.recipe.mirror, self.augmentation)
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


def _statistics(pixels: Tensor, from_imagenet: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, both of shape (channels, 1, 1)."""
    if from_imagenet:
        return torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    pixels = pixels.float()
    return pixels.mean((0, 2, 3))[:, None, None], pixels.std((0, 2, 3))[:, None, None]


def _rate(recipe: Recipe, steps_of_epochs: list[int]) -> Callable[[int], float]:
    """Share of the learning rate at each step: a linear rise, then a cosine that ends at 0."""
    rise, total = sum(steps_of_epochs[: recipe.warmup]), sum(steps_of_epochs)

    def rate(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2

    return rate


def _batches(recipe: Recipe, seed: int, labels: Tensor) -> list[list[Tensor]]:
    """Indices of every batch of every epoch."""
    identities = min(recipe.identities, int(labels.max()) + 1)
    size = identities * recipe.instances
    # Of a set smaller than a batch an epoch is one batch.
    sampler = MPerClassSampler(labels, recipe.instances, size, length_before_new_iter=max(size, len(labels)))
    np.random.seed(seed)  # what the sampler draws from
    return [list(torch.tensor(list(sampler)).split(size)) for _ in range(recipe.epochs)]
