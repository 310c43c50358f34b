"""drsl-evaluate: mAP, mINP and CMC of features from a file, by the protocol of Market-1501.

Give the features in one of two forms:

  drsl-evaluate FEATURES.npz
      The file has the arrays query [Q, D] and gallery [M, D], query_ids [Q] and gallery_ids [M]. If there are
      cameras, it also has query_cams [Q] and gallery_cams [M]:
          np.savez("features.npz", query=..., gallery=..., query_ids=..., gallery_ids=..., query_cams=..., ...)

  drsl-evaluate QUERY.npy GALLERY.npy --ids IDS.csv
      IDS.csv has a header, and then one line for each row of the two arrays, in the same order,
      with commas, semicolons or tabs between the columns:
          set,id,camera
          query,17,1
          gallery,17,2
      If there are no cameras, leave out the column "camera".

Gallery images with the query's identity and camera are removed. Without cameras, nothing is removed but the query's
own image, where the file has query_paths and gallery_paths, as drsl-extract writes them. Images with the identity -1
are junk, and have no effect; --junk names others. The distractors of Market-1501, identity 0, stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from pml_drsl.checks import InputError
from pml_drsl.console import check_outputs, version, write_text
from pml_drsl.evaluation import METRICS, PROTOCOLS, RANKS, TIES

# torch and numpy are imported after the arguments are read, so that --help is fast.

EPILOG = """examples:
  drsl-evaluate features.npz --metric cosine
  drsl-evaluate features.npz --metric cosine --rerank --ranks 1 5 --json scores.json
  drsl-evaluate query.npy gallery.npy --ids ids.csv --no-cameras
  drsl-evaluate features.npz --junk -1 background
"""


def run(args: argparse.Namespace) -> None:
    """Computes, prints and writes the scores of feature files; raises InputError for bad input."""
    import torch

    from pml_drsl.evaluation.scores import evaluate

    if min(args.ranks) < 1:
        raise InputError(f"--ranks {min(args.ranks)}: ranks start at 1")
    check_outputs({"--json": args.json}, [*args.features, args.ids])
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    data = read(args)
    options = {name: getattr(args, name) for name in ("ties", "protocol", "rerank", "seed", "junk")}
    options |= {"max_rank": max(50, *args.ranks), "device": device, "progress": sys.stderr.isatty()}
    result = evaluate(**data, **options)
    if args.json:
        write_text(args.json, json.dumps(result.to_dict(), indent=2) + "\n")
        if args.json == "-":
            return
    pairs = f"{result.num_junk} pairs left out (the same image, or the same person and camera)"
    protocol = pairs if "query_cams" in data else "no cameras: nothing left out"
    left_out = len(data["query"]) - result.num_query + len(data["gallery"]) - result.num_gallery
    junk = f"; {left_out} images with a junk identity left out" if left_out else ""
    queries = f"{result.num_query} queries ({result.num_unmatched} without a match, not scored)"
    print(f"{queries}, {result.num_gallery} gallery images, {data['metric']} distance; {protocol}{junk}")
    for name, value in result.scores(args.ranks).items():
        print(f"{name:<8} {value:7.2%}")


def read(args: argparse.Namespace) -> dict[str, Any]:
    """The features, labels and metric of the files that were given, as ``evaluate`` takes them; ``--metric`` comes
    before the metric of a file. InputError for bad files."""
    from pml_drsl.evaluation.arrays import CAMERAS, read_npy, read_npz

    if args.ids and len(args.features) == 1:
        raise InputError("--ids goes with two .npy files; a .npz file holds its own query_ids and gallery_ids")
    if len(args.features) == 1:
        data = read_npz(args.features[0], not args.no_cameras)
    else:
        data = read_npy(args.features, args.ids)
        data = {name: array for name, array in data.items() if not (args.no_cameras and name in CAMERAS)}
    return data | {"metric": args.metric or data.get("metric", "euclidean")}


def parser() -> argparse.ArgumentParser:
    """The options for feature files."""
    made = argparse.ArgumentParser(
        "drsl-evaluate", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--version", action="version", version=f"%(prog)s {version()}")
    add("features", help="FEATURES.npz, QUERY.npy GALLERY.npy, or folders of runs", nargs="+", metavar="FILE")
    add("--ids", help="identities and cameras of the two .npy files", metavar="IDS.csv")
    add("--metric", help="distance (what drsl-extract wrote in the file, else euclidean)", choices=METRICS)
    about = "order of a match and a negative at the same distance: mean (each counts half before the other), "
    about += "optimistic (the match first), pessimistic (the negative first); default: %(default)s"
    add("--ties", help=about, choices=TIES, default="mean")
    add("--rerank", help="re-rank by k-reciprocal neighbours first (slower)", action="store_true")
    about = "how CMC is measured (%(default)s, as for Market-1501)"
    add("--protocol", help=about, choices=PROTOCOLS, default="standard")
    add("--seed", help="seed of the draws of single-gallery-shot (%(default)s)", type=int, default=0)
    about = "identities of images that have no effect (-1); without an ID, every image counts"
    add("--junk", help=about, nargs="*", default=["-1"], metavar="ID")
    about = "ignore cameras: only the query's own image is removed, where the file has paths"
    add("--no-cameras", help=about, action="store_true")
    add("--ranks", help="ranks to print (1 5 10 20)", type=int, nargs="+", default=list(RANKS), metavar="K")
    add("--json", help="write all scores, the CMC curve and the counts here; -: print them alone", metavar="FILE")
    add("--device", help="where to compute (cuda if there is a device, else cpu)", choices=["cpu", "cuda"])
    return made
