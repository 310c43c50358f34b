"""The options that the commands that use a trained network share. It does not import torch, for a quick ``--help``."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterable
from typing import Any

from pml_drsl import console
from pml_drsl.checks import InputError
from pml_drsl.machine import available_cores

NAMES = "market"  # how names carry identities and cameras, where --names does not say
EXIT_STATUS = "\n\nexit status: 0; 2 for bad input, which is explained on stderr; 130 for Ctrl-C"


def preload_workers() -> None:
    """Where a server starts the processes that read images, as on Linux since Python 3.14, it imports once what each of
    them needs. Called before the first of them starts."""
    multiprocessing.set_forkserver_preload(["torchreid_ext.search.features"])


def parser(name: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    """A parser with the checkpoint and the options that every command has; its help ends with the exit status."""
    preload_workers()
    made = argparse.ArgumentParser(
        name,
        description=description,
        epilog=epilog + EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--version", action="version", version=f"{name} {console.version()}")
    add("checkpoint", metavar="CHECKPOINT",
        help="for example log/demo/model/model-best.pth.tar, or the folder of a run, whose best checkpoint is "
        "taken")  # fmt: skip
    add("--model", metavar="NAME",
        help="name of the network, such as osnet_x0_25, for a checkpoint that holds no configuration, such as weights "
        "of torchreid's zoo")  # fmt: skip
    add("--config-file", metavar="FILE",
        help="the YAML file of the training, for a checkpoint that holds no configuration. No check notices a wrong "
        "model.last_stride")  # fmt: skip
    return made


def add_device(made: argparse.ArgumentParser) -> None:
    """Adds the options that say how features are extracted."""
    add = made.add_argument
    add("--device", choices=["cpu", "cuda"], help="where to compute; default: the GPU where there is one")
    add("--batch-size", type=int, metavar="N", help="images in a batch; default: test.batch_size")
    add("--workers", type=int, metavar="N", default=min(4, available_cores()),
        help="processes that read images; default: %(default)s")  # fmt: skip
    add("--skip-damaged", action="store_true", help="leave out damaged images, and name them")
    add("--names", default=NAMES, metavar="KIND",
        help="how names carry identities and cameras: market (0002_c1s1_000451_03.jpg), folder (anna/hall_1.jpg), "
        "msmt17, veri, or a regular expression with the groups identity and camera; default: %(default)s")  # fmt: skip


def extraction(args: argparse.Namespace) -> dict[str, Any]:
    """The options of ``extract_files`` that the user gave to :func:`add_device`."""
    return {"batch_size": args.batch_size, "workers": args.workers, "skip_damaged": args.skip_damaged}


def check_sources(names: str, sources: Iterable[str]) -> None:
    """Refuses an unknown KIND of ``--names`` and sources that do not exist, before the network is loaded."""
    from torchreid_ext.images import check_exists, pattern  # torch alone, where torchreid takes seconds more

    pattern(names, "--names")
    for source in sources:
        check_exists(source)


def check_outputs(outputs: dict[str, str | None], inputs: Iterable[str | None]) -> None:
    """Refuses files to write as :func:`pml_drsl.console.check_outputs` does, and those with the name of an image, which
    a folder, a list or an index may hold."""
    console.check_outputs(outputs, inputs)
    try:
        from torchreid_ext.pixels import is_image
    except ModuleNotFoundError:  # Features alone are evaluated without Pillow, which knows the names of images.
        return
    for option, path in outputs.items():
        # Of a link, the target would be written.
        if path and is_image(target := os.path.realpath(path)):
            raise InputError(f"{option} {path} would write {target!r}, which has the name of an image: give another")
