"""Writes a trained network to a file in ONNX, TorchScript or torch.export, which other programs load.

The file takes a batch of any size, [N, 3, height, width] in RGB order with values in [0, 1], and gives [N, D] features.
The normalisation is part of the file, so do not normalise before it; with --without-normalisation, do. Before the file
takes its place, its features of several different images are compared with torch's, and the largest difference is
printed. Above 1e-4 of the largest feature value no file is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pml_drsl.checks import InputError
from torchreid_ext.cli import console
from torchreid_ext.search import sources
from torchreid_ext.search.export import SUFFIXES, export, settings
from torchreid_ext.search.model import load_model

EXAMPLES = """
    drsl-export log/demo/model/model-best.pth.tar model.onnx
    drsl-export log/demo/model/model-best.pth.tar model.onnx --images photos --without-normalisation
    drsl-export log/demo/model/model-best.pth.tar model.pt --torchscript
    drsl-export log/demo/model/model-best.pth.tar model.pt2 --torch-export
    drsl-export osnet.pth model.onnx --config-file configs/market1501_osnet_x0_25.yaml
"""

# More images than this would only take longer.
COMPARED = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for bad input, which stderr explains, or 130."""
    args = _parser().parse_args(arguments)
    return console.guarded("drsl-export", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Exports the network and prints how far its features are from torch's.

    Raises:
        InputError: for bad input, a network that cannot be exported, or an exported file that is wrong.
    """
    if Path(args.output).is_dir() or not Path(args.output).absolute().parent.is_dir():
        raise InputError(f"{args.output!r} is not a file in a folder that exists")
    model = load_model(args.checkpoint, args.config_file, "cpu")
    images = None
    if args.images:
        entries = sources.list_folder(args.images).gallery
        # Evenly over the folder, so that they show different people.
        images = [entry.path for entry in entries[:: max(1, len(entries) // COMPARED)]][:COMPARED]
    comparison = export(model, args.output, args.kind, args.normalise, images)
    print(comparison)
    about = settings(model, args.normalise)
    print(f"{args.output!r} takes [N, 3, {about['height']}, {about['width']}]: {about['input']}")
    if not args.normalise:
        print(f"mean {about['mean']}, std {about['std']}")


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("drsl-export", __doc__, EXAMPLES)
    parser.add_argument("output", metavar="OUTPUT", help=f"the file to write: {', '.join(SUFFIXES.values())}")
    kinds = parser.add_mutually_exclusive_group()
    for kind in ("torchscript", "torch-export"):
        kinds.add_argument(
            f"--{kind}",
            dest="kind",
            action="store_const",
            const=kind,
            default="onnx",
            help=f"write {kind} ({SUFFIXES[kind]}) instead of ONNX",
        )
    parser.add_argument(
        "--without-normalisation",
        dest="normalise",
        action="store_false",
        help="leave the normalisation out of the file: whoever uses it must normalise",
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="compare with images of this folder (drawn pedestrians otherwise)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
