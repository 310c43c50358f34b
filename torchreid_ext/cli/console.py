"""The options that the commands that use a trained network share. It does not import torch, for a quick ``--help``."""

from __future__ import annotations

import argparse
import textwrap

from pml_drsl.console import version
from pml_drsl.machine import available_cores

EXIT_STATUS = "\n\nexit status: 0; 2 for bad input, which is explained on stderr; 130 for Ctrl-C"


def parser(name: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser with the checkpoint and the options that every command has; ``examples`` are its command lines."""
    made = argparse.ArgumentParser(
        name,
        description=description,
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ") + EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--version", action="version", version=f"{name} {version()}")
    add("checkpoint", metavar="CHECKPOINT",
        help="for example log/demo/model/model-best.pth.tar, or the folder of a run, whose best checkpoint is "
        "taken")  # fmt: skip
    add("--model", metavar="NAME",
        help="network of a checkpoint that holds no configuration, such as weights of torchreid's zoo: "
        "osnet_x0_25")  # fmt: skip
    add("--config-file", metavar="FILE",
        help="the YAML file that this network was trained with, for a checkpoint that holds no configuration; its "
        "model.bnneck and model.last_stride must fit the weights")  # fmt: skip
    return made


def add_device(made: argparse.ArgumentParser) -> None:
    """Adds the options that say how features are extracted."""
    add = made.add_argument
    add("--device", choices=["cpu", "cuda"], help="where to compute (the GPU where there is one)")
    add("--batch-size", type=int, metavar="N", help="images in a batch (test.batch_size of the configuration)")
    add("--workers", type=int, metavar="N", default=min(4, available_cores()),
        help="processes that read images (%(default)s)")  # fmt: skip
    add("--skip-damaged", action="store_true", help="leave out images that cannot be read, and list them at the end")
    add("--names", default="market", metavar="KIND",
        help="how names carry identities and cameras: market (0002_c1s1_000451_03.jpg), folder (anna/hall_1.jpg), "
        "msmt17, veri, or a regular expression with the groups identity and camera (%(default)s)")  # fmt: skip
