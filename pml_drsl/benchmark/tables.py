"""The results of experiments as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from tabulate import tabulate

from pml_drsl.benchmark.training import protocol
from pml_drsl.benchmark.training.candidates import CANDIDATES, DRSL, SMALL_POWER
from pml_drsl.benchmark.training.protocol import ALONE, BESIDE
from pml_drsl.benchmark.training.results import Results
from pml_drsl.benchmark.training.statistics import Difference, mean_ranks, paired_bootstrap
from pml_drsl.benchmark.training.trial import Trial

Scores = dict[str, list[list[float]]]
"""Of each row: for each set, the score of every seed, in [0, 1]."""
NOTHING = "Nothing has run yet."


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are aligned in plain text too."""
    return str(tabulate(rows, header, "github", disable_numparse=True)) if rows else NOTHING


def values(results: Results, trial: Trial | None, name: str = "") -> list[float]:
    """A score of the trial with every seed that there is a result of, in [0, 1]; by default the score of its set."""
    return [] if trial is None else [results.score(one, name) for one in results.seeds(trial)]


def spread(numbers: Sequence[float], seeds: int = 0) -> str:
    """Mean and standard deviation, in percent; and the number of seeds where it is less than ``seeds``."""
    if not numbers:
        return "-"
    of_spread = f" ± {100 * stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{100 * fmean(numbers):.1f}{of_spread}" + (f" ({counted(len(numbers))})" if len(numbers) < seeds else "")


def counted(seeds: int) -> str:
    return f"{seeds} seed{'' if seeds == 1 else 's'}"


def trials_out_of_the_box(results: Results, where: str) -> dict[str, list[Trial | None]]:
    """Of each loss: for each set, its trial ``"alone"`` or ``"beside cross-entropy"``."""
    return {loss: [protocol.out_of_the_box(name, loss)[where] for name in results.sets] for loss in CANDIDATES}


def trials_tuned(results: Results) -> dict[str, list[Trial | None]]:
    """Of each loss: for each set, the trial that validation chose."""
    return {loss: [protocol.tuned(results, name, loss) for name in results.sets] for loss in CANDIDATES}


def scores_of(results: Results, trials: Mapping[str, Sequence[Trial | None]]) -> Scores:
    """Scores of the losses that have a result on some set."""
    found = {loss: [values(results, trial) for trial in of_loss] for loss, of_loss in trials.items()}
    return {loss: scores for loss, scores in found.items() if any(scores)}


def ranks_of(scores: Scores) -> dict[str, float]:
    """Mean rank over the sets of each loss that has a result on every set. DRSL takes part with its default alone."""
    ranked = {loss: of_loss for loss, of_loss in scores.items() if all(of_loss) and loss != SMALL_POWER}
    return mean_ranks({loss: [fmean(one) for one in of_loss] for loss, of_loss in ranked.items()})


def out_of_the_box(results: Results) -> str:
    """Both tables of the losses with their defaults."""
    return "\n\n".join(over_sets(results, trials_out_of_the_box(results, where), where) for where in (ALONE, BESIDE))


def tuned(results: Results) -> str:
    """The table of the losses that validation tuned."""
    return over_sets(results, trials_tuned(results), "tuned")


def over_sets(results: Results, trials: Mapping[str, Sequence[Trial | None]], title: str) -> str:
    """Scores of each loss on each set, in percent, and its mean rank; the best mean rank comes first.

    A loss without a result on some set has no mean rank, and comes last. The header has the number of seeds, and so has
    the cell of a loss that has run with fewer.
    """
    scores = scores_of(results, trials)
    ranks = ranks_of(scores)
    order = sorted(scores, key=lambda loss: ranks.get(loss, math.inf))
    seeds = [max((len(of_loss[one]) for of_loss in scores.values()), default=0) for one in range(len(results.sets))]
    columns = (
        f"{name}, {of_set['score']}" + (f", {counted(most)}" if most else "")
        for (name, of_set), most in zip(results.sets.items(), seeds, strict=True)
    )
    rows = [[loss, *map(spread, scores[loss], seeds), f"{ranks[loss]:.1f}" if loss in ranks else "-"] for loss in order]
    return markdown([title, *columns, "mean rank"], rows)


def ahead(results: Results, ours: Trial | None, theirs: Trial | None) -> Difference | None:
    """How far a trial is ahead of another one by the scores of test identities, over the seeds that both have."""
    if ours is None or theirs is None:
        return None
    mine, others = (
        {one.seed: row["identities"] for one in results.seeds(trial) if "identities" in (row := results.found[one.key])}
        for trial in (ours, theirs)
    )
    seeds = sorted(set(mine) & set(others))
    if not seeds:
        return None
    longest = max(len(mine[seed]) for seed in seeds)
    rows = ([_filled(of[seed], longest) for seed in seeds] for of in (mine, others))
    return paired_bootstrap(next(rows), next(rows))


def _filled(scores: list[float | None], length: int) -> list[float | None]:
    return scores + [None] * (length - len(scores))


def differences(results: Results, trials: Mapping[str, Sequence[Trial | None]], ours: str = DRSL) -> str:
    """One loss less every other one on each set, in points, with 95 % intervals; an asterisk where 0 is outside."""
    rows = []
    for loss, of_loss in trials.items():
        found = [ahead(results, mine, theirs) for mine, theirs in zip(trials[ours], of_loss, strict=True)]
        if loss != ours and any(found):
            rows.append([loss, *map(_difference, found)])
    return markdown([f"{ours} less", *results.sets], rows)


def _difference(found: Difference | None) -> str:
    if found is None:
        return "-"
    mean, low, high = (number / 100 for number in (found.mean, found.low, found.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" + ("*" if found.significant else "")


def chosen(results: Results) -> str:
    """What validation chose for each loss on each set, and of how many trials."""
    trials = trials_tuned(results)
    rows = []
    for loss, of_loss in trials.items():
        if any(of_loss):
            tried = (len(protocol.tried(results, name, loss)) for name in results.sets)
            cells = (
                f"{described(trial)}; best of {number}" if trial else "-"
                for trial, number in zip(of_loss, tried, strict=True)
            )
            rows.append([loss, *cells])
    return markdown(["loss", *results.sets], rows)


def costs(results: Results) -> str:
    """On each set, the time of a training step, relative to the cheapest loss, and the memory that it adds."""
    if not results.costs:
        return "No costs have been measured."
    rows: dict[str, list[str]] = {loss: [] for of_set in results.costs.values() for loss in of_set}
    for of_set in results.costs.values():
        cheapest = min(cost["seconds"] for cost in of_set.values())
        for loss, cells in rows.items():
            cost = of_set.get(loss)
            cells.append(f"{cost['seconds'] / cheapest:.2f}, {cost['peak_bytes'] / 2**20:.1f} MiB" if cost else "-")
    return markdown(["time, memory", *results.costs], [[loss, *cells] for loss, cells in rows.items()])


def scores_few_positives(results: Results, name: str) -> dict[str, dict[int, list[float]]]:
    """Of each loss that ran with few positives: the scores at each number of negatives."""
    found = {
        loss: {number: values(results, trial) for number, trial in protocol.few_positives(name, loss).items()}
        for loss in protocol.FEW_POSITIVES
    }
    return {loss: of_number for loss, of_number in found.items() if any(of_number.values())}


def few_positives(results: Results) -> dict[str, str]:
    """For each set: the score of each loss against the number of negatives, and what it loses from its best."""
    found = {}
    for name, of_set in results.sets.items():
        rows = []
        for loss, of_number in scores_few_positives(results, name).items():
            means = [fmean(scores) for scores in of_number.values() if scores]
            lost = f"{100 * (means[-1] - max(means)):+.1f}" if all(of_number.values()) else "-"
            rows.append([loss, *map(spread, of_number.values()), lost])
        if rows:
            numbers = [f"1:{number}" for number in protocol.NEGATIVES]
            found[name] = markdown([of_set["score"], *numbers, f"{numbers[-1]} less the best"], rows)
    return found


def batches(results: Results, sizes: Sequence[int] = protocol.BATCHES) -> dict[str, str]:
    """For each set: the test score of each loss at each size of the batch, with the learning rate of its best trial."""
    found = {}
    for name, of_set in results.sets.items():
        rows = []
        for loss in protocol.OF_BATCHES:
            best = protocol.best_of_batches(results, name, loss, sizes)
            scores = {size: values(results, trial) for size, trial in best.items()}
            if any(scores.values()):
                rates = {size: f" at {trial.changes['lr']:g}" for size, trial in best.items()}
                rows.append([loss, *(spread(scores.get(size, ())) + rates.get(size, "") for size in sizes)])
        if rows:
            found[name] = markdown([of_set["score"], *(f"{size:,} images" for size in sizes)], rows)
    return found


def ablation(results: Results, where: str) -> str:
    """Validation score of DRSL with each change on each set, in percent, ``"alone"`` or ``"beside cross-entropy"``;
    and what the change adds to the score without it, in the mean over the sets."""
    of_sets = [protocol.ablation(name, where) for name in results.sets]
    found = [[protocol.validation_score(results, trial) for _, trial in of_set] for of_set in of_sets]
    without = [scores[0] for scores in found]
    # The default is one of the values of each group. A group has rows where another value was tried too.
    tried = {
        change.group
        for of_set, scores in zip(of_sets, found, strict=True)
        for (change, trial), score in zip(of_set, scores, strict=True)
        if score is not None and (trial != of_set[0][1] or change is of_set[0][0])
    }
    rows = []
    for index, change in enumerate(protocol.CHANGES):
        scores = [of_set[index] for of_set in found]
        if change.group in tried and any(score is not None for score in scores):
            cells = ["-" if score is None else f"{100 * score:.1f}" for score in scores]
            pairs = zip(scores, without, strict=True)
            gains = [score - start for score, start in pairs if score is not None and start is not None]
            mean = f"{100 * fmean(gains):+.1f}" if len(gains) == len(scores) else "-"
            rows.append([change.group, change.label, *cells, mean])
    return markdown([where, "", *results.sets, "mean gain"], rows)


def parameters(point: Mapping[str, Any]) -> str:
    """Parameters of a loss, in a few words."""
    return ", ".join(f"{name} {value}" for name, value in point.items()) or "defaults"


def described(trial: Trial) -> str:
    """Parameters of a trial, and what it has beside its loss, in a few words."""
    beside = [f"cross-entropy * {trial.cross_entropy:g}"] if trial.cross_entropy else []
    return ", ".join([parameters(trial.parameters), *beside])


def grid(results: Results) -> str:
    """The settings that tuning tried, of every loss that was tuned on some set."""
    losses = [loss for loss, trials in trials_tuned(results).items() if any(trials)]
    return markdown(["loss", "tried"], [[loss, "; ".join(map(parameters, CANDIDATES[loss].grid))] for loss in losses])
