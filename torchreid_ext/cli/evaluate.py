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

Give runs of drsl-train in the place of files, to compare them, or to see why one fails:

  drsl-evaluate RUN RUN2 ...
      One table of the mAP and rank-1 that the runs wrote: a row for the sources of each run, a column for each target.

  drsl-evaluate RUN --errors
      One page: the queries with the lowest average precision with what came before their first match, mAP by pair of
      cameras, the distances of matches and of others with the point of equal error, and a map of the gallery. RUN is a
      folder or a checkpoint, and its test images are searched again: those of its first target, or of its validation
      identities. --root says where the data sets are, if they have moved since. FEATURES.npz of drsl-extract is taken
      too.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pml_drsl.checks import InputError
from pml_drsl.console import guarded, say, version, write_text
from pml_drsl.evaluation import METRICS, PROTOCOLS, RANKS, TIES
from pml_drsl.machine import available_cores
from torchreid_ext.cli import console

# The rest is imported when it is asked for, so that --help is fast, and feature files need the base installation alone.

EPILOG = """examples:
  drsl-evaluate features.npz --metric cosine
  drsl-evaluate features.npz --metric cosine --rerank --ranks 1 5 --json scores.json
  drsl-evaluate query.npy gallery.npy --ids ids.csv --no-cameras
  drsl-evaluate features.npz --junk -1 background
  drsl-evaluate log/demo --errors
  drsl-evaluate features.npz --errors --html errors.html
  drsl-evaluate log/market1501 log/msmt17 --csv table.csv"""

FILES = ("metrics.json", "config.yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status, which :func:`pml_drsl.console.guarded` explains."""
    parser = argparse.ArgumentParser(
        "drsl-evaluate",
        usage="%(prog)s [options] FEATURES.npz | QUERY.npy GALLERY.npy | RUN [RUN2 ...]",
        description=__doc__,
        epilog=EPILOG + console.EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"%(prog)s {version()}")
    add("features", help="FEATURES.npz, QUERY.npy GALLERY.npy, or folders of runs", nargs="+", metavar="FILE")
    add("--ids", help="identities and cameras of the two .npy files", metavar="IDS.csv")
    add("--metric", help="distance; default: what drsl-extract wrote in the file, else euclidean", choices=METRICS)
    about = "order of a match and a negative at the same distance: mean (each counts half before the other), "
    about += "optimistic (the match first), pessimistic (the negative first); default: %(default)s"
    add("--ties", help=about, choices=TIES, default="mean")
    add("--rerank", help="re-rank by k-reciprocal neighbours first (slower)", action="store_true")
    about = "how CMC is measured; default: %(default)s, as for Market-1501"
    add("--protocol", help=about, choices=PROTOCOLS, default="standard")
    add("--seed", help="seed of the draws of single-gallery-shot; default: %(default)s", type=int, default=0)
    about = "identities of images that have no effect; without an ID, every image counts; default: -1"
    add("--junk", help=about, nargs="*", default=["-1"], metavar="ID")
    about = "ignore cameras: only the query's own image is removed, where the file has paths"
    add("--no-cameras", help=about, action="store_true")
    add("--ranks", help="ranks to print; default: 1 5 10 20", type=int, nargs="+", default=list(RANKS), metavar="K")
    add("--json", help="write all scores, the CMC curve and the counts here; -: print them alone", metavar="FILE")
    add("--device", help="where to compute; default: cuda if there is a device, else cpu", choices=["cpu", "cuda"])
    add = parser.add_argument_group("runs of drsl-train").add_argument
    add("--errors", action="store_true", help="write a page that shows why a search fails")
    add("--html", metavar="PAGE.html", help="page of --errors; default: errors.html in the run, or beside the file")
    add("--csv", metavar="FILE", help="write the table of several runs here")
    add("--root", metavar="FOLDER", help="folder of the run's data sets, for --errors; default: where the run had them")
    args = parser.parse_args(arguments)
    if args.errors and not args.html:
        given = Path(args.features[0])
        args.html = str((given if given.is_dir() else given.parent) / "errors.html")
    return guarded("drsl-evaluate", lambda: _run(parser, args), [args.json, args.html, args.csv])


def _scores(args: argparse.Namespace) -> None:
    """Computes, prints and writes the scores of feature files; raises InputError for bad input."""
    import torch

    from pml_drsl.evaluation.scores import evaluate

    if min(args.ranks) < 1:
        raise InputError(f"--ranks {min(args.ranks)}: ranks start at 1")
    console.check_outputs({"--json": args.json}, [*args.features, args.ids])
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    data = _read(args)
    _check_junk(args.junk, data)
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


def _read(args: argparse.Namespace) -> dict[str, Any]:
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


def _check_junk(junk: Sequence[str], data: dict[str, Any]) -> None:
    """Raises InputError for a junk identity that no image has: misspelt, it would have no effect, without a word."""
    from pml_drsl.evaluation.arrays import label_array

    shown = {str(label) for side in ("query_ids", "gallery_ids") for label in label_array(data[side]).flat}
    if absent := [name for name in junk if name not in {*shown, "-1"}]:
        raise InputError(f"--junk {absent[0]}: no image has this identity: correct it, or leave it out")


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if absent := [name for name in args.features if not Path(name).exists()]:
        raise InputError(f"{absent[0]!r} does not exist: give a file of features, or the folder of a run")
    work, takes, where = _scores, set(vars(args)) - {"html", "csv", "root"}, "feature files"
    if args.errors:
        work, takes, where = _errors, {"errors", "html", "junk"}, "--errors"
        takes |= {"ids", "metric", "no_cameras"} if _holds_features(args.features[0]) else {"root", "device"}
    elif any(Path(name).is_dir() for name in args.features):
        work, takes, where = _compare, {"csv"}, "runs without --errors"
    elif others := [name for name in args.features if not _holds_features(name)]:
        cure = "give features, of drsl-extract CHECKPOINT --output features.npz, or a run: drsl-evaluate RUN --errors"
        raise InputError(f"{others[0]!r} is no .npz or .npy file: {cure}")
    for name, value in vars(args).items():
        if name not in takes | {"features"} and value != parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} does not go with {where}: leave it out (see --help)")
    work(args)


def _holds_features(name: str) -> bool:
    return name.lower().endswith((".npz", ".npy"))


def _errors(args: argparse.Namespace) -> None:
    from pml_drsl.evaluation.arrays import PATHS, load_arrays
    from torchreid_ext.evaluation import errors
    from torchreid_ext.search.features import extract_sets
    from torchreid_ext.search.model import NoConfiguration, load_model
    from torchreid_ext.search.sources import test_images

    console.preload_workers()
    console.check_outputs({"--html": args.html}, [*args.features, args.ids])
    if _holds_features(args.features[0]):
        data = _read(args)
        metric = data.pop("metric")
        held = load_arrays(args.features[0]) if len(args.features) == 1 else {}
        paths: list[Any] = [held.get(name) for name in PATHS]
    elif len(args.features) > 1:
        raise InputError(f"--errors takes one run, got {len(args.features)}")
    else:
        try:
            model = load_model(args.features[0], device=args.device)
        except NoConfiguration as error:
            cure = "write the features of your own with drsl-extract, and give that file"
            unknown = f"checkpoint {args.features[0]!r} holds no configuration, so its test images are unknown"
            raise InputError(f"{unknown}: {cure}") from error
        metric, table = model.metric, test_images(model.config, args.root, model.people)
        console.check_outputs({"--html": args.html}, [model.path])
        data, paths, workers = dict[str, Any](), [], min(4, available_cores())
        for side, found in extract_sets(model, table, workers=workers, skip_damaged=True).items():
            data |= {side: found.features, f"{side}_ids": [row.identity for row in found.entries]}
            data[f"{side}_cams"] = [row.seen_by for row in found.entries]
            paths.append([row.path for row in found.entries])
    _check_junk(args.junk, data)
    search, pictures = errors.prepare(data, paths, metric, args.junk)
    caption = errors.write_page(args.html, search, pictures, f"Why {args.features[0]} fails")
    say(f"By {metric} distance: {caption}")
    say(f"The page to look at is {args.html!r}")


def _compare(args: argparse.Namespace) -> None:
    rows = table(args.features)
    console.check_outputs({"--csv": args.csv}, (str(Path(run, name)) for run in args.features for name in FILES))
    if args.csv:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(args.csv, text.getvalue())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        say("  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))


def table(runs: Sequence[str]) -> list[list[str]]:
    """The scores that finished runs wrote, in percent: a line for the heads, and a line for the sources of each run.

    Each target has a column for mAP and one for rank-1; a run that was not tested on it has ``"-"``. Runs with the same
    sources also have their folders as names. Raises InputError if scores or a configuration are missing or damaged."""
    import yaml

    scores, sources = list[dict[str, str]](), list[str]()
    for run in runs:
        metrics, config = (Path(run, name) for name in FILES)
        try:
            row: dict[str, str] = {}
            for target, of in json.loads(metrics.read_bytes()).items():
                # The CMC begins with rank-1.
                row |= {f"{target} mAP": f"{100 * of['mAP']:.1f}", f"{target} rank-1": f"{100 * of['cmc'][0]:.1f}"}
            scores.append(row)
            sources.append("+".join(yaml.safe_load(config.read_bytes())["data"]["sources"]))
        except (FileNotFoundError, NotADirectoryError) as error:
            cure = "give the folders of finished runs of drsl-train, or feature files alone"
            raise InputError(f"{run!r} has no {Path(error.filename).name}: {cure}") from error
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, yaml.YAMLError) as error:
            raise InputError(f"{run!r}: {' or '.join(FILES)} is damaged ({error}): test the run again") from error
    columns = list(dict.fromkeys(column for of_run in scores for column in of_run))
    names = [f"{name} ({run})" if sources.count(name) > 1 else name for name, run in zip(sources, runs, strict=True)]
    lines = zip(names, scores, strict=True)
    return [["sources", *columns], *([name, *(row.get(column, "-") for column in columns)] for name, row in lines)]


if __name__ == "__main__":
    sys.exit(main())
