"""Which trials choose the settings of a loss, and what they chose. Nothing here sees a test identity."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from pml_drsl.benchmark.training.candidates import CANDIDATES, CROSS_ENTROPY
from pml_drsl.benchmark.training.results import Protocol, Results
from pml_drsl.benchmark.training.trial import Trial

ALONE = "alone"
MEMORY = "memory"
MEMORY_AND_CROSS_ENTROPY = "memory, cross-entropy"
BEST = "best recipe"
WEIGHTS = (0.1, 1.0)
"""Of cross-entropy beside a loss."""
MEMORY_SIZE = 1024
RATES = (0.5, 2.0)
"""Learning rates of the network, in units of the protocol's."""
FINALISTS = 3


def settings(protocol: Protocol, loss: str) -> list[Trial]:
    """A loss with every point of its grid that is tried."""
    return [protocol.validation.but(loss=loss, parameters=point) for point in CANDIDATES[loss].grid[: protocol.tried]]


def score(results: Results, trial: Trial, seeds: int = 1) -> float | None:
    """Mean MAP@R over the seeds from 0; None where a run is missing."""
    repeated = [trial.but(seed=seed) for seed in range(seeds)]
    return fmean(map(results.score, repeated)) if all(one in results for one in repeated) else None


def best_first(results: Results, trials: Sequence[Trial], seeds: int = 1) -> list[Trial]:
    """Those with results of all these seeds, by their mean MAP@R."""
    scored = [(score(results, trial, seeds), trial) for trial in trials]
    found = [(value, trial) for value, trial in scored if value is not None]
    return [trial for _, trial in sorted(found, key=lambda pair: -pair[0])]


def recipes_of(results: Results, protocol: Protocol, loss: str) -> dict[str, list[Trial]]:
    """Every recipe's trials: the loss alone, and with the best two of its settings what may stand around it. As long
    as there are no results of the settings, those are all."""
    alone = settings(protocol, loss)
    best = best_first(results, alone)[:2]
    found = {ALONE: alone}
    if loss != CROSS_ENTROPY:
        found[CROSS_ENTROPY] = [trial.but(cross_entropy=weight) for trial in best for weight in WEIGHTS]
    if CANDIDATES[loss].in_memory:
        found[MEMORY] = [trial.but(memory=MEMORY_SIZE) for trial in best]
        found[MEMORY_AND_CROSS_ENTROPY] = [
            trial.but(cross_entropy=weight) for trial in found[MEMORY] for weight in WEIGHTS
        ]
    return found


def at_other_rates(results: Results, protocol: Protocol, loss: str) -> list[Trial]:
    """The best of all recipes with other learning rates of the network."""
    recipes = [trial for trials in recipes_of(results, protocol, loss).values() for trial in trials]
    return [trial.but(lr=rate * trial.lr) for trial in best_first(results, recipes)[:1] for rate in RATES]


def finalists(results: Results, protocol: Protocol, loss: str) -> list[Trial]:
    """The best three of all that was tried of a loss, by one run each, which more runs tell apart."""
    return best_first(results, tried(results, protocol, loss))[:FINALISTS]


def tried(results: Results, protocol: Protocol, loss: str) -> list[Trial]:
    recipes = recipes_of(results, protocol, loss).values()
    return [trial for trials in recipes for trial in trials] + at_other_rates(results, protocol, loss)


def best_of(results: Results, protocol: Protocol, loss: str, recipe: str) -> Trial | None:
    """The best trial of a recipe by one run each, or ``BEST``, the best finalist by all runs of the finalists."""
    if recipe == BEST:
        ranked = best_first(results, finalists(results, protocol, loss), protocol.tuning_seeds)
    else:
        ranked = best_first(results, recipes_of(results, protocol, loss).get(recipe, []))
    return ranked[0] if ranked else None


def reported(results: Results, protocol: Protocol, loss: str) -> dict[str, Trial]:
    """What of a loss is run on the test identities: alone, with cross-entropy, and by its best recipe."""
    found = {recipe: best_of(results, protocol, loss, recipe) for recipe in (ALONE, CROSS_ENTROPY, BEST)}
    return {recipe: trial.but(split="test") for recipe, trial in found.items() if trial is not None}
