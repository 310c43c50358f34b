"""Chooses settings of losses on validation identities, with as many trials for each loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pml_drsl.checks import InputError
from torchreid_ext.benchmark.grid import Run, Snippet, plan, read_results, same
from torchreid_ext.benchmark.report import TUNED
from torchreid_ext.benchmark.runner import run_all

WEIGHTS = (0.1, 0.3, 1.0, 3.0)
WEIGHT_KEYS = {"triplet": "loss.triplet.weight_t", "drsl": "loss.drsl.weight_m", "pml": "loss.pml.weight_m"}
"""The key with the weight of each ``loss.name``, beside a cross-entropy of weight 1. ``softmax`` has none."""


def tune(
    losses: Mapping[str, Snippet],
    settings: Mapping[str, Sequence[Snippet]],
    grid: Mapping[str, Any],
    results: Path,
    workers: int,
    weights: Sequence[float] = WEIGHTS,
) -> tuple[dict[str, dict[str, Any]], dict[str, float], int]:
    """First tries the weights of each loss beside cross-entropy, then its settings with the best of these weights.

    Args:
        losses: the keys that each loss sets, by its name.
        settings: further keys to try, by the name of the loss.
        grid: the other arguments of ``plan``: ``files``, ``seeds``, ``words``, ``varied``, ``root``. The configuration
            must test on validation identities, and there must be one file.
        results: the file of results. A trial that is in it is not made again.
        workers: number of runs at the same time.
        weights: the weights to try.

    Returns:
        The best keys of each loss, the mean mAP of each trial over seeds and targets, and the number of failed runs.

    Raises:
        InputError: if the configuration tests on test identities, or every trial of a loss fails.
    """
    trials: dict[str, Snippet] = {}
    for loss, snippet in losses.items():
        (run,) = plan(**{**grid, "losses": {loss: snippet}, "seeds": grid["seeds"][:1], "varied": ()})
        if not run.configuration.get("data.validation"):
            raise InputError("settings are chosen on validation identities: add data.validation 0.2 to the command")
        key = WEIGHT_KEYS.get(run.configuration["loss.name"])
        trials |= {f"{loss}*{weight:g}": {**snippet, key: weight} for weight in weights} if key else {loss: snippet}
    scores, failed = _run(trials, grid, results, workers)
    second: dict[str, Snippet] = {}
    for loss in losses:
        name = _best(loss, scores)
        for number, setting in enumerate(settings.get(loss, ()), 1):
            second[f"{name}+{number}"] = {**trials[name], **setting}
    more, failed_too = _run(second, grid, results, workers)
    trials |= second
    scores |= more
    return {loss: dict(trials[_best(loss, scores)]) for loss in losses}, scores, failed + failed_too


def _run(
    trials: Mapping[str, Snippet], grid: Mapping[str, Any], results: Path, workers: int
) -> tuple[dict[str, float], int]:
    """The mean mAP of each trial all of whose runs ended, and the number of runs that failed."""
    if not trials:
        return {}, 0
    runs = plan(**grid, losses=trials)
    failed = run_all(runs, results, workers)
    lines = read_results(results)
    scores: dict[str, list[float]] = {}
    for run in runs:
        scores.setdefault(run.loss, []).extend(_mean_ap(run, lines))
    return {name: sum(each) / len(each) for name, each in scores.items() if len(each) == len(grid["seeds"])}, failed


def _mean_ap(run: Run, lines: Sequence[Mapping[str, Any]]) -> list[float]:
    for line in reversed(lines):
        if same(run.configuration, line["configuration"]):
            values = [scores["mAP"] for scores in line["results"].values()]
            return [sum(values) / len(values)]
    return []


def _best(loss: str, scores: Mapping[str, float]) -> str:
    """The trial of a loss with the best score."""
    own = {name: score for name, score in scores.items() if name == loss or name.startswith((f"{loss}*", f"{loss}+"))}
    if not own:
        raise InputError(f"every trial of {loss} failed; the lines above say why")
    return max(own, key=own.__getitem__)


def write(path: Path, best: Mapping[str, Mapping[str, Any]], scores: Mapping[str, float]) -> None:
    """Writes the best settings as a file of losses, each as NAME-tuned, with the validation mAP of every trial."""
    head = "".join(f"#   {name}: {100 * score:.1f}\n" for name, score in scores.items())
    text = yaml.safe_dump({f"{loss}{TUNED}": dict(snippet) for loss, snippet in best.items()}, sort_keys=False)
    path.write_text(f"# Chosen by drsl-benchmark tune. mAP on validation identities, in percent:\n{head}{text}")
