"""``drsl-evaluate``: mAP, mINP and CMC of features from a file, by the protocol of Market-1501.

Give the features in one of two forms:

  drsl-evaluate FEATURES.npz
      The file has the arrays query [Q, D] and gallery [M, D], query_ids [Q] and gallery_ids [M]. If there are
      cameras, it also has query_cams [Q] and gallery_cams [M]:
          np.savez("features.npz", query=..., gallery=..., query_ids=..., gallery_ids=..., query_cams=..., ...)

  drsl-evaluate QUERY.npy GALLERY.npy --ids IDS.csv
      IDS.csv has a header, and then one line for each row of the two arrays, in the same order:
          set,id,camera
          query,17,1
          gallery,17,2
      If there are no cameras, leave out the column "camera".

Gallery images with the query's identity and camera are junk and are removed. Without cameras, nothing is removed.
The exit status is 0, or 2 for bad input, which is explained on stderr.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import pickle
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pml_drsl.checks import InputError
from pml_drsl.evaluation.scores import METRICS, PROTOCOLS, TIES, RetrievalResult, evaluate

REQUIRED = ("query", "gallery", "query_ids", "gallery_ids")
CAMERAS = ("query_cams", "gallery_cams")
COLUMNS = ("set", "id", "camera")

EPILOG = """examples:
  drsl-evaluate features.npz
  drsl-evaluate features.npz --metric cosine --rerank --ranks 1 5 --json scores.json
  drsl-evaluate query.npy gallery.npy --ids ids.csv --no-cameras
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0, or 2 for bad input, which is explained in one line on stderr.
    """
    args = _parser().parse_args(arguments)
    try:
        if min(args.ranks) < 1:
            raise InputError(f"--ranks {min(args.ranks)}: ranks start at 1")
        if args.seed < 0:
            raise InputError(f"--seed {args.seed}: seeds start at 0")
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise InputError(f"--json {args.json}: its folder does not exist")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch finds no CUDA device here")
        data = read_npz(args.features[0]) if len(args.features) == 1 else read_npy(args.features, args.ids)
        if args.ids and len(args.features) == 1:
            raise InputError("--ids goes with two .npy files; a .npz file holds its own query_ids and gallery_ids")
        if args.no_cameras:
            data = {name: array for name, array in data.items() if name not in CAMERAS}
        result = evaluate(
            **data,
            metric=args.metric,
            ties=args.ties,
            protocol=args.protocol,
            rerank=args.rerank,
            seed=args.seed,
            max_rank=max(50, *args.ranks),
            device=args.device,
            progress=sys.stderr.isatty(),
        )
        if args.json:
            Path(args.json).write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    except (InputError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"drsl-evaluate: {' '.join(text.split())}", file=sys.stderr)
        return 2
    print(report(result, args.ranks, has_cameras="query_cams" in data))
    return 0


def report(result: RetrievalResult, ranks: Sequence[int], has_cameras: bool) -> str:
    """A line that describes the search, and then one line for each score."""
    protocol = f"{result.num_junk} junk pairs left out" if has_cameras else "no cameras: nothing left out"
    lines = [
        f"{result.num_query} queries ({result.num_unmatched} without a match, not scored), "
        f"{result.num_gallery} gallery images, {protocol}"
    ]
    scores = {"mAP": result.mAP, "mINP": result.mINP} | {f"rank-{k}": result.rank(k) for k in ranks}
    return "\n".join(lines + [f"{name:<8} {value:7.2%}" for name, value in scores.items()])


def read_npz(path: str) -> dict[str, Any]:
    """The arguments of ``evaluate`` from an .npz file. Other arrays are ignored.

    Raises:
        InputError: if the file has another format, an array is missing, or the name of an array looks like a
            misspelt camera array.
        OSError: if the file cannot be read.
    """
    loaded = _load(path)
    if isinstance(loaded, np.ndarray):
        raise InputError(f"{path} holds a single array: give QUERY.npy GALLERY.npy --ids IDS.csv, or an .npz file")
    missing = [name for name in REQUIRED if name not in loaded]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}: it needs {', '.join(REQUIRED)}, and {' and '.join(CAMERAS)} if there "
            f"are cameras; it holds {', '.join(loaded) or 'nothing'}"
        )
    known = (*REQUIRED, *CAMERAS)
    for name in set(loaded) - set(known):
        near = difflib.get_close_matches(name, [camera for camera in CAMERAS if camera not in loaded], n=1)
        if near:  # Ignoring this array would silently ignore the cameras.
            raise InputError(f"{path} has an unknown array {name!r}: did you mean {near[0]!r}?")
    return {name: loaded[name] for name in known if name in loaded}


def read_npy(paths: Sequence[str], ids: str | None) -> dict[str, Any]:
    """The arguments of ``evaluate`` from two .npy files, query and gallery, and the CSV file of their identities.

    Raises:
        InputError: if there are not two files, a file has another format, or the CSV file does not match the arrays.
        OSError: if a file cannot be read.
    """
    if len(paths) != 2:
        raise InputError(f"{len(paths)} feature files given: give one .npz, or two .npy (query, gallery) with --ids")
    if ids is None:
        raise InputError("two feature files need --ids IDS.csv, with columns set,id,camera (see --help)")
    data: dict[str, Any] = {}
    for name, path in zip(("query", "gallery"), paths, strict=True):
        data[name] = _load(path)
        if not isinstance(data[name], np.ndarray):
            raise InputError(f"{path} is an .npz file: give two .npy files, or the .npz file alone")
        if data[name].ndim != 2:
            raise InputError(f"{path} has shape {list(data[name].shape)}: give [images, dimensions]")
    labels = _read_csv(ids)
    for side in ("query", "gallery"):
        if len(labels[side]) != len(data[side]):
            raise InputError(f"{ids} has {len(labels[side])} {side} lines for {len(data[side])} {side} features")
        data[f"{side}_ids"] = np.array([line[0] for line in labels[side]], dtype=str)
        if labels["columns"] == list(COLUMNS):
            data[f"{side}_cams"] = np.array([line[1] for line in labels[side]], dtype=str)
    return data


def _read_csv(path: str) -> dict[str, list[Any]]:
    """The (id, camera) pairs of the lines of each set, and the names of the columns under "columns"."""
    labels: dict[str, list[Any]] = {"query": [], "gallery": []}
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            lines = [[value.strip() for value in line] for line in csv.reader(file)]
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not a readable CSV file: {error}") from error
    columns = lines[0] if lines else []
    if sorted(columns) not in (sorted(COLUMNS), sorted(COLUMNS[:2])):
        raise InputError(f"{path} has the header {','.join(columns) or '(empty)'!r}: it needs set,id,camera")
    for number, values in enumerate(lines[1:], start=2):
        row = dict(zip(columns, values, strict=False))
        if len(values) != len(columns) or "" in values or row["set"] not in labels:
            if not any(values):  # The line is empty.
                continue
            raise InputError(
                f"{path}, line {number}: {','.join(values)!r} is not {','.join(columns)} with set query or gallery"
            )
        labels[row["set"]].append((row["id"], row.get("camera")))
    labels["columns"] = [name for name in COLUMNS if name in columns]
    return labels


def _load(path: str) -> Any:
    """The array of an .npy file, or a dict of the arrays of an .npz file.

    Raises:
        InputError: if the file has another format or contains pickled objects, which could run code.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError) as error:
        # numpy's message about pickles advises to allow them. An unknown format gives this message too.
        why = "" if "pickle" in str(error) else f": {error}"
        raise InputError(f"{path} is not a readable .npz or .npy file of plain arrays{why}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "drsl-evaluate", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features", nargs="+", metavar="FILE", help="FEATURES.npz, or QUERY.npy GALLERY.npy")
    parser.add_argument("--ids", metavar="IDS.csv", help="identities and cameras of the two .npy files")
    parser.add_argument("--metric", choices=METRICS, default="euclidean", help="distance (%(default)s)")
    parser.add_argument(
        "--ties",
        choices=TIES,
        default="mean",
        help="whether a wrong image at the distance of a match counts half, after the match or before it (%(default)s)",
    )
    parser.add_argument("--rerank", action="store_true", help="re-rank by k-reciprocal neighbours first (slower)")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="standard",
        help="how CMC is measured (%(default)s, as for Market-1501)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws of single-gallery-shot (%(default)s)")
    parser.add_argument("--no-cameras", action="store_true", help="ignore cameras, so that nothing is junk")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 5, 10, 20], metavar="K", help="ranks to print (1 5 10 20)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all scores, the CMC curve and the counts here")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
