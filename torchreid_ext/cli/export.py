"""Writes a trained network to an ONNX file, which other programs load.

The file takes a batch of any size, [N, 3, height, width] in RGB order with values in [0, 1], and gives [N, D] features.
The normalisation is part of the file, so do not normalise before it; with --without-normalisation, do. Before the file
takes its place, its features of several different images are compared with torch's, and the largest difference is
printed. Above 1e-4 of the largest feature value no file is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pml_drsl.console import guarded, say
from torchreid_ext.cli import console

EPILOG = """examples:
  drsl-export log/demo model.onnx
  drsl-export log/demo/model/model-best.pth.tar model.onnx --images photos --without-normalisation
  drsl-export osnet_x0_25_msmt17.pth model.onnx --model osnet_x0_25
  drsl-export weights.pth model.onnx --config-file log/demo/config.yaml"""

COMPARED = 16  # images; more would only take longer


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status, which :func:`pml_drsl.console.guarded` explains."""
    parser = console.parser("drsl-export", __doc__, EPILOG)
    parser.add_argument("output", metavar="OUTPUT", help="the file to write: its name ends in .onnx")
    parser.add_argument("--without-normalisation", dest="normalise", action="store_false",
                        help="leave the normalisation out of the file: whoever uses it must normalise")  # fmt: skip
    parser.add_argument("--images", metavar="FOLDER",
                        help="compare with images of this folder; default: drawn pedestrians")  # fmt: skip
    args = parser.parse_args(arguments)
    return guarded("drsl-export", lambda: run(args), [args.output])


def run(args: argparse.Namespace) -> None:
    """Exports the network and prints how far its features are from torch's; raises InputError."""
    from torchreid_ext.search.export import export, settings
    from torchreid_ext.search.model import find_checkpoint, load_model
    from torchreid_ext.search.sources import list_queries

    checkpoint = find_checkpoint(args.checkpoint)
    console.check_outputs({"OUTPUT": args.output}, [checkpoint, args.config_file, args.images])
    model = load_model(checkpoint, args.config_file, "cpu", args.model)
    images = None
    if args.images:
        paths = [row.path for row in list_queries([args.images]).rows]
        # Evenly over the folder, so that they show different people.
        images = paths[:: max(1, len(paths) // COMPARED)][:COMPARED]
    say(export(model, args.output, args.normalise, images))
    about = settings(model, args.normalise)
    say(f"{args.output!r} takes [N, 3, {about['height']}, {about['width']}]: {about['input']}")
    if not args.normalise:
        say(f"mean {about['mean']}, std {about['std']}")


if __name__ == "__main__":
    sys.exit(main())
