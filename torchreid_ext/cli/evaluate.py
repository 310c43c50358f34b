"""Scores features from files, compares finished runs, and shows why a run fails.

Feature files alone need no more than the base installation, because the rest is imported when it is asked for.
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
from pml_drsl.console import guarded, say, write_text
from pml_drsl.evaluation import cli
from pml_drsl.machine import available_cores
from torchreid_ext.cli import console

RUNS = """
Give runs of drsl-train in the place of files, to compare them, or to see why one fails:

  drsl-evaluate RUN RUN2 ...
      One table of the mAP and rank-1 that the runs wrote: a row for the sources of each run, a column for each target.

  drsl-evaluate RUN --errors
      One page: the queries with the lowest average precision with what came before their first match, mAP by pair of
      cameras, the distances of matches and of others with the point of equal error, and a map of the gallery. RUN is a
      folder or a checkpoint, and its test images are searched again: those of its first target, or of its validation
      identities. --root says where the data sets are, if no longer where the run had them. FEATURES.npz of drsl-extract
      will do too.
"""

EXAMPLES = """  drsl-evaluate log/demo --errors
  drsl-evaluate features.npz --errors --html errors.html
  drsl-evaluate log/market1501 log/msmt17 --csv table.csv"""

FILES = ("metrics.json", "config.yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status, which :func:`pml_drsl.console.guarded` explains."""
    parser = cli.parser()
    parser.description, parser.epilog = f"{parser.description}{RUNS}", f"{parser.epilog}{EXAMPLES}{console.EXIT_STATUS}"
    parser.usage = "drsl-evaluate [options] FEATURES.npz | QUERY.npy GALLERY.npy | RUN [RUN2 ...]"
    add = parser.add_argument_group("runs of drsl-train").add_argument
    add("--errors", action="store_true", help="write a page that shows why a search fails")
    add("--html", metavar="PAGE.html", help="page of --errors (errors.html beside the file, or in the run's folder)")
    add("--csv", metavar="FILE", help="write the table of several runs here")
    add("--root", metavar="FOLDER", help="folder of the run's data sets for --errors (where the run had them)")
    args = parser.parse_args(arguments)
    if args.errors and not args.html:
        given = Path(args.features[0])
        args.html = str((given if given.is_dir() else given.parent) / "errors.html")
    return guarded("drsl-evaluate", lambda: _run(parser, args), [args.json, args.html, args.csv])


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    work, takes, where = cli.run, set(vars(args)) - {"html", "csv", "root"}, "feature files"
    if args.errors:
        work, takes, where = _errors, {"errors", "html", "junk"}, "--errors"
        takes |= {"ids", "metric", "no_cameras"} if _holds_features(args.features[0]) else {"root", "device"}
    elif any(Path(name).is_dir() for name in args.features):
        work, takes, where = _compare, {"csv"}, "runs without --errors"
    elif others := [name for name in args.features if Path(name).is_file() and not _holds_features(name)]:
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

    console.check_outputs({"--html": args.html}, [*args.features, args.ids])
    if _holds_features(args.features[0]):
        data = cli.read(args)
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
