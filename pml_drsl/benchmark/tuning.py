"""Which trials choose the settings of a loss, and what they chose. Nothing here sees a test identity."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from pml_drsl.benchmark.candidates import CANDIDATES, CROSS_ENTROPY
from pml_drsl.benchmark.results import Protocol, Results
from pml_drsl.benchmark.trial import Trial

ALONE = "alone"
MEMORY = "memory"
MEMORY_AND_CROSS_ENTROPY = "memory, cross-entropy"
SMALLER = "smaller batches"
BEST = "best recipe"
WEIGHTS = (0.1, 1.0)
"""Of cross-entropy beside a loss."""
MEMORY_SIZE = 1024


def settings(protocol: Protocol, loss: str) -> list[Trial]:
    """A loss with every point of its grid that is tried."""
    return [protocol.validation.but(loss=loss, parameters=point) for point in CANDIDATES[loss].grid[: protocol.tried]]


def best_first(results: Results, protocol: Protocol, trials: Sequence[Trial]) -> list[Trial]:
    """Those with results, by their mean MAP@R over the tuning seeds."""
    scored = [(validation_score(results, protocol, trial), trial) for trial in trials]
    found = [(score, trial) for score, trial in scored if score is not None]
    return [trial for _, trial in sorted(found, key=lambda pair: -pair[0])]


def validation_score(results: Results, protocol: Protocol, trial: Trial) -> float | None:
    repeated = [trial.but(seed=seed) for seed in range(protocol.tuning_seeds)]
    return fmean(map(results.score, repeated)) if all(trial in results for trial in repeated) else None


def recipes_of(protocol: Protocol, ranked: Sequence[Trial]) -> dict[str, list[Trial]]:
    """What to try of a loss besides it alone, given its settings, best first; for as long as what is tested trains.

    The memory, which changes how many negatives a query has, is tried with the best two settings.
    """
    longer = [trial.but(epochs=protocol.base.epochs) for trial in ranked[:2]]
    first = longer[0]
    found = {ALONE: [first]}
    if first.loss != CROSS_ENTROPY:
        found[CROSS_ENTROPY] = [first.but(cross_entropy=weight) for weight in WEIGHTS]
    if CANDIDATES[first.loss].in_memory:
        found[MEMORY] = [trial.but(memory=MEMORY_SIZE) for trial in longer]
        found[MEMORY_AND_CROSS_ENTROPY] = [
            trial.but(cross_entropy=weight) for trial in found[MEMORY] for weight in WEIGHTS
        ]
    return found


def in_smaller_batches(ranked: Sequence[Trial]) -> list[Trial]:
    """The best two of all recipes in batches of half as many identities: twice the steps, of the same images."""
    return [trial.but(identities=max(2, trial.identities // 2)) for trial in ranked[:2]]


def chosen(results: Results, protocol: Protocol, loss: str) -> dict[str, Trial]:
    """The best trial of every recipe, as far as there are results, by the name of the recipe; on validation."""
    ranked = best_first(results, protocol, settings(protocol, loss))
    if not ranked:
        return {}
    recipes = recipes_of(protocol, ranked)
    recipes[SMALLER] = in_smaller_batches(all_recipes(results, protocol, loss))
    best = {name: best_first(results, protocol, trials) for name, trials in recipes.items()}
    return {name: trials[0] for name, trials in best.items() if trials}


def all_recipes(results: Results, protocol: Protocol, loss: str) -> list[Trial]:
    """Every trial of every recipe in batches of the protocol's size, as far as there are results, best first."""
    ranked = best_first(results, protocol, settings(protocol, loss))
    recipes = recipes_of(protocol, ranked) if ranked else {}
    return best_first(results, protocol, [trial for trials in recipes.values() for trial in trials])


def reported(results: Results, protocol: Protocol, loss: str) -> dict[str, Trial]:
    """What of a loss is run on the test identities: alone, with cross-entropy, and ``BEST``, by its best recipe."""
    found = chosen(results, protocol, loss)
    trials = {name: found[name] for name in (ALONE, CROSS_ENTROPY) if name in found}
    if found:
        trials[BEST] = best_first(results, protocol, list(found.values()))[0]
    return {name: trial.but(split="test") for name, trial in trials.items()}
