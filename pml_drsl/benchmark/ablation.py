"""What every part and setting of DRSL does for it: one change at a time, on the validation identities.

It starts from ``DRSLoss()``, alone and beside cross-entropy of weight 1, and changes its parts, its settings, the
batch, and what stands beside it. Everything else stays, so that a larger batch, for example, has fewer steps in the
same epochs. The defaults of ``DRSLoss()`` were chosen by the groups ``temperature`` and ``sort_weight``.

Examples:
  drsl-benchmark ablation --quick
  drsl-benchmark ablation --changes temperature sort_weight --sets docs/benchmark-sets.yaml --root data --weights FILE
  drsl-benchmark ablation --sets docs/benchmark-sets.yaml --only viper --root data --weights mobilenetv2.pth.tar
"""

from __future__ import annotations

import argparse
import shlex

from pml_drsl.benchmark import tables
from pml_drsl.benchmark.training import experiment
from pml_drsl.benchmark.training.candidates import DRSL
from pml_drsl.benchmark.training.protocol import ALONE, BESIDE, GROUPS, ablation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--changes",
        nargs="+",
        choices=GROUPS,
        default=list(GROUPS),
        metavar="WHAT",
        help=f"which changes to try: {', '.join(map(shlex.quote, GROUPS))} (all)",
    )
    experiment.add_arguments(parser, of=(DRSL,))


def run(args: argparse.Namespace) -> int:
    with experiment.prepare(args) as bench:
        # "nothing" is what every other change is compared with.
        groups = ["nothing", *args.changes]
        trials = [
            trial for name in bench.sets for where in (ALONE, BESIDE) for _, trial in ablation(name, where, groups)
        ]
        bench.validate(trials, "ablation")
    print("\n\n".join(tables.ablation(bench.results, where) for where in (ALONE, BESIDE)))
    return 0
