"""``drsl-benchmark``, or ``python -m pml_drsl.benchmark``: one subcommand per question."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from pml_drsl.checks import InputError

# Each is a module of this package with `add_arguments(parser)` and `run(args) -> int`, imported only when asked for.
COMMANDS = {
    "defaults": "every loss out of the box, on one data set or several",
    "quality": "retrieval quality, trained with each loss under one protocol",
    "imbalance": "retrieval quality against the number of negatives per positive",
    "batches": "retrieval quality against the size of the batch",
    "ablation": "what every part and setting of DRSL does for it",
    "report": "a page of tables and plots, from the results of these five",
    "speed": "time and memory of DRSL and of pytorch-metric-learning's ranking losses, against the distance matrix",
    "gpu": "everything that needs a GPU: CUDA tests, training, evaluation, and the time of the loss",
    "evaluation": "time and agreement of the re-ID evaluation with other implementations",
}

TIMING = ("speed", "gpu", "evaluation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; ``arguments`` default to the command line. Returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="drsl-benchmark",
        description="Benchmarks of DRSL.",
        epilog="commands:\n" + "\n".join(f"  {name:12} {about}" for name, about in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="drsl-benchmark {" + ",".join(COMMANDS) + "} [options]; options: drsl-benchmark COMMAND --help",
    )
    parser.add_argument("command", choices=COMMANDS, help="what to measure")
    name = parser.parse_args(arguments[:1]).command
    folder = "pml_drsl.benchmark.timing" if name in TIMING else "pml_drsl.benchmark"
    try:
        command = import_module(f"{folder}.{name}")
        options = argparse.ArgumentParser(
            prog=f"drsl-benchmark {name}",
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(options)
        chosen = options.parse_args(arguments[1:])
        for flag in ("json", "csv", "markdown", "plot"):  # known before the work, not after
            path = getattr(chosen, flag, None)
            if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
                options.error(f"--{flag} {path}: not a file in a folder that exists")
        status: int = command.run(chosen)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "pml_drsl"):
            raise
        extra = "reid" if package == "torchreid" else "benchmark"
        print(f"drsl-benchmark {name} needs {package}: pip install 'pml-drsl[{extra}]'", file=sys.stderr)
        return 2
    except (InputError, FloatingPointError, OSError) as error:
        print(f"drsl-benchmark {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ndrsl-benchmark {name}: interrupted; the same command goes on with what is not done", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
