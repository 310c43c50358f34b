"""Which trials each experiment makes, and what validation chose.

Nothing here chooses by a test score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from pml_drsl.benchmark.training.candidates import CANDIDATES, CROSS_ENTROPY, DRSL, SMALL_POWER, defaults
from pml_drsl.benchmark.training.images import TEST
from pml_drsl.benchmark.training.results import Results
from pml_drsl.benchmark.training.trial import Trial

ALONE, BESIDE = "alone", "beside cross-entropy"
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Weights of cross-entropy beside a loss that tuning tries."""
NEGATIVES = (15, 60, 250, 1000)
"""Negatives of each query, with one positive, in the experiment with few positives."""
FEW_POSITIVES = (DRSL, SMALL_POWER, "MultiSimilarity", "SupCon", "Contrastive", "Circle")
MEMORY = 2048
"""Size of the memory that these negatives come from."""
BATCHES = (64, 256, 1024)
"""Images in a batch, in the experiment on batches."""
RATES = (0.5, 1.5, 5.0)
"""Learning rates tried at each size of a batch, in units of the recipe's."""
OF_BATCHES = (DRSL, "SupCon", "MultiSimilarity")


def out_of_the_box(name: str, loss: str) -> dict[str, Trial]:
    """A loss on a set with its library's defaults, alone and beside cross-entropy of weight 1.

    Cross-entropy alone stands for itself in both.
    """
    alone = Trial(name, TEST, loss, defaults(loss))
    return {ALONE: alone, BESIDE: alone if loss == CROSS_ENTROPY else alone.but(cross_entropy=1.0)}


def on_folds(trial: Trial, folds: int) -> list[Trial]:
    """The trial on each part of the training identities that validation holds out."""
    return [trial.but(split=f"fold {fold}") for fold in range(folds)]


def by_weight(name: str, loss: str, weights: Sequence[float] = WEIGHTS) -> list[Trial]:
    """The first step of tuning: the default of a loss beside cross-entropy of each weight."""
    weights = weights[:1] if loss == CROSS_ENTROPY else weights
    return [Trial(name, TEST, loss, defaults(loss), cross_entropy=weight) for weight in weights]


def by_setting(results: Results, name: str, loss: str, settings: int | None = None) -> list[Trial]:
    """The second step of tuning: each setting of a loss, beside cross-entropy of the weight that was best; no trial
    as long as the first step has no result."""
    best = best_first(results, by_weight(name, loss))[:1]
    return [trial.but(parameters=point) for trial in best for point in CANDIDATES[loss].grid[:settings]]


def validation_score(results: Results, trial: Trial) -> float | None:
    """Mean score over the folds; None where a fold is missing."""
    folds = on_folds(trial, results.sets[trial.set]["folds"])
    return fmean(map(results.score, folds)) if all(fold in results for fold in folds) else None


def best_first(results: Results, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that have results on all folds, by their mean score."""
    scored = [(validation_score(results, trial), trial) for trial in trials]
    found = [(score, trial) for score, trial in scored if score is not None]
    return [trial for _, trial in sorted(found, key=lambda pair: -pair[0])]


def tried(results: Results, name: str, loss: str) -> list[Trial]:
    """The trials of a loss that both steps of tuning have scored on all folds, best first; none before the second step
    has results."""
    settings = best_first(results, by_setting(results, name, loss))
    # The default at the best weight is a setting too.
    trials = {trial.key: trial for trial in (*by_weight(name, loss), *settings)}
    return best_first(results, list(trials.values())) if len(settings) > 1 else []


def tuned(results: Results, name: str, loss: str) -> Trial | None:
    """The trial of a loss that was best on validation; None before the second step of tuning has results."""
    return next(iter(tried(results, name, loss)), None)


def few_positives(name: str, loss: str) -> dict[int, Trial]:
    """A loss with its defaults at each number of negatives: one positive and so many negatives of every query, drawn
    at random from the batch and a memory."""
    changes = {"identities": 32, "instances": 2}
    base = Trial(name, TEST, loss, defaults(loss), memory=MEMORY, changes=changes)
    return {number: base.but(negatives_per_positive=float(number)) for number in NEGATIVES}


def by_batch(of_set: Mapping[str, Any], loss: str, sizes: Sequence[int] = BATCHES) -> dict[int, list[Trial]]:
    """A loss with its defaults, alone, at each size of the batch and at each learning rate.

    The recipe's number of images for each identity and number of epochs stay, so that every trial shows as many images.
    A larger batch has fewer steps.

    Args:
        of_set: what a results file says of a data set.
        loss: name of the loss.
        sizes: numbers of images in a batch, multiples of the recipe's number for each identity.
    """
    base, recipe = Trial(of_set["name"], TEST, loss, defaults(loss)), of_set["recipe"]
    return {
        size: [
            base.but(changes={"identities": size // recipe["instances"], "lr": rate * recipe["lr"]}) for rate in RATES
        ]
        for size in sizes
    }


def best_of_batches(results: Results, name: str, loss: str, sizes: Sequence[int] = BATCHES) -> dict[int, Trial]:
    """The trial whose learning rate is best on validation, at each size of the batch that has results."""
    tried = {size: best_first(results, trials) for size, trials in by_batch(results.sets[name], loss, sizes).items()}
    return {size: best[0] for size, best in tried.items() if len(best) == len(RATES)}


@dataclass(frozen=True)
class Change:
    """One change of DRSL's default, or of what is around it.

    Attributes:
        group: what is changed.
        label: to what.
        parameters: parameters of the loss that change.
        around: fields of the trial that change.
    """

    group: str
    label: str
    parameters: dict[str, Any] = field(default_factory=dict)
    around: dict[str, Any] = field(default_factory=dict)


def _parameter(name: str, *values: Any) -> list[Change]:
    return [Change(name, f"{value}", {name: value}) for value in values]


def _recipe(group: str, label: str, **changes: Any) -> Change:
    return Change(group, label, around={"changes": changes})


# In units of the retrieval error, beside which nothing of that error is left.
SORT_ONLY = 1000.0

CHANGES = [
    Change("nothing", "DRSLoss()"),
    Change("parts", "sort only", {"sort_weight": SORT_ONLY}),
    *_parameter("sort_weight", 0.0, 0.1, 0.3, 0.5, 1.0),
    *_parameter("temperature", 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2),
    *_parameter("margin", 0.05, 0.1, 0.2),
    *_parameter("bound_power", None, 0.1, 1.0),
    *_parameter("distance", "cosine", "euclidean", "squared euclidean"),
    Change(
        "definition",
        "euclidean, 0.01, 0.3, no bound",
        {"distance": "euclidean", "temperature": 0.01, "sort_weight": 0.3, "bound_power": None},
    ),
    *(_recipe("images per identity, of 64", f"{k}", instances=k, identities=64 // k) for k in (2, 4, 8)),
    *(_recipe("identities in a batch", f"{number}", identities=number) for number in (8, 16, 32, 64)),
    _recipe("views of each image", "2", views=2),
    Change("memory", "1024", around={"memory": 1024}),
]
"""What the ablation tries, one change at a time."""
GROUPS = tuple(dict.fromkeys(change.group for change in CHANGES))


def ablation(name: str, where: str, groups: Sequence[str] = GROUPS) -> list[tuple[Change, Trial]]:
    """Every change of the groups with its trial on a set, ``"alone"`` or ``"beside cross-entropy"`` of weight 1."""
    # A seed of its own keeps the results of the ablation apart from the trials that tuning chooses from.
    start = out_of_the_box(name, DRSL)[where].but(seed=1)
    return [
        (change, start.but(parameters={**start.parameters, **change.parameters}, **change.around))
        for change in CHANGES
        if change.group in groups
    ]
