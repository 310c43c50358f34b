"""Extracts the features of images with a trained network, for drsl-evaluate and drsl-search.

The checkpoint of a run says which network it is, and how images are resized and normalised. Weights of torchreid's zoo
need the name of the network: --model osnet_x0_25. A SOURCE is one of these:

  FOLDER      with the folders query and bounding_box_test (or gallery), as in Market-1501, or one of these folders
  FOLDER      of images in any folders below it; where the names of all of them carry identities, as --names says, the
              first image of each identity and camera is a query, and all are gallery images. An image without a camera
              has one of its own, so that it is a query
  FILE.csv    with the columns path,pid,camid,split; images of the split train are left out, and a camera may be missing
  FILE.jpg    or any other image: a gallery image

One identity in several sources is one person. Without a SOURCE, the test images of the run itself are taken: those of
its first target, or of its validation identities. --root says where the data sets are, if they have moved since. The
output is what drsl-evaluate reads: the features of query and gallery with identities and cameras. Where names carry no
identities, it holds features and paths alone, which drsl-search reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pml_drsl.checks import InputError
from pml_drsl.console import guarded, say
from torchreid_ext.cli import console

EPILOG = """examples:
  drsl-extract log/demo --output features.npz
  drsl-extract log/demo/model/model-best.pth.tar photos list.csv --output features.npz --names folder
  drsl-extract osnet_x0_25_msmt17.pth --model osnet_x0_25 photos --output features.npz
  drsl-extract weights.pth --config-file log/demo/config.yaml photos --output features.npz
  torchrun --standalone --nproc_per_node gpu -m torchreid_ext.cli.extract CHECKPOINT photos --output features.npz"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status, which :func:`pml_drsl.console.guarded` explains."""
    parser = console.parser("drsl-extract", __doc__, EPILOG)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="folders, CSV files and images")
    parser.add_argument("--output", required=True, metavar="FILE.npz", help="where to write the features")
    parser.add_argument("--root", metavar="FOLDER", help="folder of the data sets; default: where the run had them")
    parser.add_argument("--no-cameras", dest="cameras", action="store_false",
                        help="take no cameras from names, such as IMG from anna/IMG_1.jpg: then every photo below a "
                        "folder of people is a query")  # fmt: skip
    console.add_device(parser)
    args = parser.parse_intermixed_args(arguments)  # Options may stand before, between and after the sources.
    return guarded("drsl-extract", lambda: run(args), [args.output])


def run(args: argparse.Namespace) -> None:
    """Extracts and writes the features; raises InputError for bad input."""
    if Path(args.output).suffix != ".npz":
        raise InputError(f"--output {args.output}: the name of the file must end in .npz")
    if args.root and args.sources:
        raise InputError("--root is for the test images of the run itself: leave it out where a SOURCE is given")
    given = "--no-cameras" if not args.cameras else "--names" if args.names != console.NAMES else ""
    if given and not args.sources:
        cure = "leave it out here" + ", and give it to drsl-evaluate" * (not args.cameras)
        raise InputError(f"{given} is for a SOURCE: {cure}")
    if args.model and not args.sources:
        raise InputError("weights that --model names have no run, and so no test images: give a SOURCE")
    console.check_sources(args.names, args.sources)

    from torchreid_ext.runtime import distributed
    from torchreid_ext.search.features import extract_sets, write_features
    from torchreid_ext.search.model import load_model
    from torchreid_ext.search.sources import list_sources, shown, test_images

    with distributed.joined(args.device != "cpu"):
        model = load_model(args.checkpoint, args.config_file, args.device, args.model)
        console.check_outputs({"--output": args.output}, [model.path, args.config_file, *args.sources])
        table = (
            list_sources(args.sources, args.names, args.cameras)
            if args.sources
            # torchreid's files have another order on another machine.
            else distributed.from_first(lambda: test_images(model.config, args.root, model.people))
        )
        if table.left_out:
            say(table.about_left_out())
        sets = extract_sets(model, table, **console.extraction(args))
        labelled = distributed.is_first() and write_features(args.output, model, sets)
        rows = [row for part in sets.values() for row in part.entries]
        counts = " and ".join(f"{len(part.entries)} {name}" for name, part in sets.items())
        dim = next(iter(sets.values())).features.shape[1]
        say(f"{counts} features of {dim} dimensions are in {args.output!r}")
        if labelled:
            cameras = sorted({row.camera for row in rows} - {""})
            if cameras:
                say(f"Cameras: {', '.join(cameras) if len(cameras) < 9 else len(cameras)}")
            people, seen = {row.identity for row in rows}, {(row.identity, row.seen_by) for row in rows}
            if len(seen) > len(people):
                say(f"Scores: drsl-evaluate {args.output}")
            elif len({row.path for row in rows}) > len(people):
                cure = "if cameras do not matter, give the same command with --no-cameras"
                say(f"There are no scores to compute: that needs matches from another camera; {cure}")
            else:
                say("There are no scores to compute: that needs a second image of a person")
        elif unknown := [shown(row.path) for row in rows if not row.identity]:
            about = f"no identity is known for {len(unknown):,} of {len(rows):,} images, the first being {unknown[0]!r}"
            cure = "leave them out, or say with --names who they are, by their paths below the folder that is given"
            say(f"There are no scores to compute: {about}: {cure}")
        else:
            say("There are no scores to compute: that needs query and gallery images")


if __name__ == "__main__":
    sys.exit(main())
