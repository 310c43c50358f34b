"""What the commands share: their options, and what they print when the input is bad."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable

from pml_drsl.checks import InputError
from pml_drsl.machine import available_cores
from torchreid_ext.runtime import distributed


def parser(name: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser with the checkpoint and the options that every command has.

    Args:
        name: of the command.
        description: what the command does.
        examples: command lines, one a line.
    """
    made = argparse.ArgumentParser(
        name,
        description=description,
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("checkpoint", metavar="CHECKPOINT", help="for example log/demo/model/model-best.pth.tar")
    made.add_argument(
        "--config-file",
        metavar="FILE",
        help="YAML configuration of the network, for a checkpoint that holds none, such as torchreid's own",
    )
    return made


def add_device(made: argparse.ArgumentParser) -> None:
    """Adds the options that say how features are extracted."""
    made.add_argument("--device", choices=["cpu", "cuda"], help="where to compute (the GPU where there is one)")
    made.add_argument(
        "--batch-size", type=int, metavar="N", help="images in a batch (test.batch_size of the configuration)"
    )
    made.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=min(4, available_cores()),
        help="processes that read images (%(default)s)",
    )
    made.add_argument(
        "--skip-damaged", action="store_true", help="leave out images that cannot be read, and list them at the end"
    )


def guarded(name: str, work: Callable[[], None]) -> int:
    """Runs a command and returns its exit status: 0, 2 for bad input, which stderr explains, or 130 if interrupted."""
    try:
        work()
    except (InputError, OSError) as error:
        who = f" process {distributed.rank()}:" if distributed.size() > 1 else ""
        print(f"{name}:{who} {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0
