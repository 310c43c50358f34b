"""The list of the parts of ``drsl-benchmark gpu``; run as a program, this module runs one part."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pml_drsl.benchmark.timing import gpu_checks, gpu_speed
from pml_drsl.benchmark.timing.gpu_row import Row, Setting


@dataclass(frozen=True)
class Part:
    """A part of the command.

    Attributes:
        title: the name in the table.
        rows: the function that runs the part.
        seconds: the time limit. The limits of all parts add up to less than 8 minutes.
    """

    title: str
    rows: Callable[[Setting], Iterator[Row]]
    seconds: float


PARTS = {
    "tests": Part("CUDA tests", gpu_checks.tests, 180),
    "fp16": Part("fp16 training", gpu_checks.fp16, 55),
    "evaluation": Part("evaluation", gpu_checks.evaluation, 40),
    "neck": Part("neck", gpu_checks.neck, 45),
    "nccl": Part("NCCL, one process", gpu_checks.nccl, 40),
    "loss": Part("loss alone", gpu_speed.loss, 55),
    "step": Part("training step", gpu_speed.step, 60),
}


def main() -> None:
    """Runs one part, and adds each row to a file of JSON lines as soon as the row is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("device", choices=["cuda", "cpu"])
    parser.add_argument("folder", type=Path, help="folder for files")
    parser.add_argument("results", type=Path, help="file of JSON lines that gets the rows")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    with open(args.results, "a", encoding="utf-8") as file:
        for row in PARTS[args.part].rows(Setting(args.device, args.quick, args.folder)):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
