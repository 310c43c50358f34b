"""What every part and setting of DRSL does for it: one change at a time, on the validation identities.

It starts from DRSL's best recipe (which is looked for first, where its results are not in the file) and changes its
parts, its settings, the batch, and what stands beside it. Everything else stays, so that a larger batch, for one, has
fewer steps of the same epochs.

Examples:
  drsl-benchmark ablation --quick
  drsl-benchmark ablation --train train/ --test test/ --results benchmark.jsonl
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from pml_drsl.benchmark import quality, tables
from pml_drsl.benchmark.training import experiment
from pml_drsl.benchmark.training.candidates import DRSL
from pml_drsl.benchmark.training.results import Protocol, Results
from pml_drsl.benchmark.training.trial import Trial
from pml_drsl.benchmark.training.tuning import BEST, MEMORY_SIZE, best_of, tried

# In units of the retrieval error, which is at most 1: nothing of it is left.
SORT_ONLY = 1000.0
DEFAULTS = {"distance": "euclidean", "temperature": 0.01, "margin": 0.0, "sort_weight": 0.3, "bound": False}


@dataclass(frozen=True)
class Change:
    """One change of a trial: of the loss's parameters, or of what is around it."""

    group: str
    label: str
    parameters: dict[str, Any]
    around: dict[str, Any]


def _parameter(group: str, name: str, values: list[Any]) -> list[Change]:
    return [Change(group, f"{value}", {name: value}, {}) for value in values]


def _around(group: str, name: str, values: list[Any]) -> list[Change]:
    return [Change(group, f"{value}", {}, {name: value}) for value in values]


CHANGES = [
    Change("parts", "retrieval only", {"sort_weight": 0.0}, {}),
    Change("parts", "both, sort_weight 0.3", {"sort_weight": 0.3}, {}),
    Change("parts", "sort only", {"sort_weight": SORT_ONLY}, {}),
    *_parameter("sort_weight", "sort_weight", [0.0, 0.03, 0.1, 0.3, 1.0]),
    *_parameter("temperature", "temperature", [0.01, 0.02, 0.05, 0.1, 0.2]),
    *_parameter("margin", "margin", [0.0, 0.05, 0.1, 0.2]),
    *(
        Change(
            "retrieval error",
            f"{'bound' if bound else 'as defined'}, temperature {t}, margin {m}",
            {"bound": bound, "temperature": t, "margin": m},
            {},
        )
        for bound, t, m in (
            (False, 0.02, 0.0),
            (False, 0.05, 0.1),
            (False, 0.1, 0.1),
            (True, 0.02, 0.0),
            (True, 0.05, 0.0),
            (True, 0.1, 0.0),
        )
    ),
    *(
        Change("distance", f"{distance}, temperature {t}", {"distance": distance, "temperature": t}, {})
        for distance, t in (
            ("cosine", 0.02),
            ("squared euclidean", 0.04),
            ("euclidean", 0.02),
            ("euclidean", 0.05),
            ("raw euclidean", 0.1),
        )
    ),
    *(Change("images per identity, of 64", f"{k}", {}, {"instances": k, "identities": 64 // k}) for k in (2, 4, 8, 16)),
    *(Change("batch, 4 images per identity", f"{4 * p}", {}, {"identities": p}) for p in (8, 16, 32, 64, 128)),
    *_around("weight of cross-entropy", "cross_entropy", [0.0, 0.03, 0.1, 0.3, 1.0, 3.0]),
    *_around("memory", "memory", [0, 256, MEMORY_SIZE, 4 * MEMORY_SIZE]),
    Change("memory", "0, the defaults of DRSLoss", DEFAULTS, {"memory": 0}),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    experiment.add_arguments(parser, losses=False)


def run(args: argparse.Namespace) -> int:
    with experiment.prepare(args) as bench:
        results, protocol = bench.results, bench.protocol
        quality.tune(bench, [DRSL])
        bench.run([trial for _, trial in trials(results, protocol)], "ablation", bench.seeds)
    print(table(results, protocol))
    return 0


def trials(results: Results, protocol: Protocol) -> list[tuple[Change, Trial]]:
    """Every change with its trial; none as long as DRSL is not tuned."""
    start = best_of(results, protocol, DRSL, BEST)
    if start is None:
        return []
    return [
        (change, start.but(parameters={**start.parameters, **change.parameters}, **change.around)) for change in CHANGES
    ]


def found(results: Results, protocol: Protocol) -> list[tuple[Change, list[float]]]:
    """Every change that there are results of, with its MAP@R by seed; none where only what tuning tried has run."""
    known = tried(results, protocol, DRSL)
    of_change = [(change, trial, tables.values(results, trial)) for change, trial in trials(results, protocol)]
    if all(trial in known for _, trial, scores in of_change if scores):
        return []
    return [(change, scores) for change, _, scores in of_change if scores]


def tuned(results: Results, protocol: Protocol) -> list[float]:
    """MAP@R of DRSL without a change, with every seed that there is a result of."""
    start = best_of(results, protocol, DRSL, BEST)
    return [] if start is None else tables.values(results, start)


def table(results: Results, protocol: Protocol) -> str:
    """MAP@R with every change that has run, in percent."""
    rows = [[change.group, change.label, tables.spread(scores)] for change, scores in found(results, protocol)]
    return tables.markdown(["what", "value", "MAP@R, validation"], rows)
