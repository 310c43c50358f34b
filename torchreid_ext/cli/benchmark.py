"""Compares losses: trains a grid of configuration files, losses and seeds, and reports its results."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pml_drsl import speed
from pml_drsl.checks import InputError
from pml_drsl.console import check_outputs, guarded, version, write_text
from pml_drsl.machine import available_cores

BEGIN = "<!-- drsl-benchmark report: begin -->"
END = "<!-- drsl-benchmark report: end -->"

EPILOG = """commands:
  run       train and test a grid; each run is a process of drsl-train, and its result a line of a file
  tune      choose weight and settings of losses on validation identities
  report    tables, comparisons and a figure of such a file
  speed     time and memory of the loss, which needs no torchreid

examples:
  drsl-benchmark run configs/market1501_osnet_x0_25.yaml --losses drsl triplet --seeds 3 --root DATA \\
      --results results.jsonl model.load_weights osnet_x0_25_msmt17.pth
  drsl-benchmark run configs/viper_mobilenetv2.yaml --seeds 3 --vary data.split_id 0 2 4 --root DATA \\
      --results results.jsonl model.load_weights mobilenetv2_imagenet.pth.tar
  drsl-benchmark tune configs/viper_mobilenetv2.yaml --losses drsl supcon --root DATA --results tuning.jsonl \\
      --output tuned.yaml data.validation 0.5 model.load_weights mobilenetv2_imagenet.pth.tar
  drsl-benchmark report results.jsonl

exit status: 0; 1 if a run failed (the same command repeats it); 2 for bad input; 130 for Ctrl-C, 143 for SIGTERM,
129 for a closed terminal
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 if a run failed, 2 for bad input, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        "drsl-benchmark", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands: dict[str, Any] = {"run": _run, "tune": _tune, "report": _report, "speed": speed.main}
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    parser.add_argument("command", choices=commands)
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="options: drsl-benchmark COMMAND --help")
    args = parser.parse_args(arguments)
    stopped = "stopped; the same command goes on from the results that are there"
    return guarded("drsl-benchmark", lambda: commands[args.command](args.words), (), stopped, "reid,benchmark")


def _run(words: Sequence[str]) -> int:
    args, grid = _grid(words, "run", "Trains and tests a grid.")

    from torchreid_ext.benchmark.grid import plan
    from torchreid_ext.benchmark.runner import run_all

    return min(1, run_all(plan(**grid, losses=args.chosen[0]), args.results, args.workers, args.keep))


def _tune(words: Sequence[str]) -> int:
    args, grid = _grid(words, "tune", "Chooses weight and settings of losses on validation identities.")
    if len(grid["files"]) > 1 or not args.output:
        raise InputError("tune takes one CONFIG.yaml, and --output FILE.yaml for the settings that it chooses")
    # A file of results may be in a new folder, which holds no other file.
    results = str(args.results) if args.results.parent.is_dir() else None
    inputs = map(str, (*grid["files"], args.losses_file))
    check_outputs({"--results": results, "--output": str(args.output)}, inputs)

    from torchreid_ext.benchmark import runner

    losses, settings = args.chosen
    best, scores, failed = runner.tune(losses, settings, grid, args.results, args.workers)
    runner.write_tuned(args.output, best, scores)
    return min(1, failed)


def _grid(words: Sequence[str], command: str, text: str) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options of ``run`` and ``tune``, and the arguments of ``grid.plan`` but for the losses."""
    needed = {"run": "CONFIG.yaml ... --results FILE", "tune": "CONFIG.yaml --results FILE --output FILE.yaml"}[command]
    parser = argparse.ArgumentParser(
        f"drsl-benchmark {command}", usage=f"%(prog)s {needed} [options] [KEY VALUE ...]", description=text
    )
    add = parser.add_argument
    add("words", nargs="+", metavar="CONFIG.yaml ... [KEY VALUE ...]",
        help="configuration files, and config keys to change in all runs")  # fmt: skip
    add("--losses", nargs="+", metavar="NAME", help="losses of the file of losses; default: all")
    add("--losses-file", type=Path, metavar="FILE", help="default: losses.yaml beside the first CONFIG")
    seeds = 3 if command == "run" else 1
    add("--seeds", type=int, default=seeds, metavar="N", help="seeds 0 to N - 1 (default: %(default)s)")
    add("--vary", nargs="+", action="append", default=[], metavar=("KEY VALUE", "VALUE"),
        help="a key and its value for each seed: data.split_id 0 2 4")  # fmt: skip
    add("--results", type=Path, required=True, metavar="FILE",
        help="JSON lines; runs that are in this file already are not made again")  # fmt: skip
    add("--workers", type=int, default=available_cores(), metavar="N",
        help="runs at the same time; default: one for each core")  # fmt: skip
    add("--root", metavar="FOLDER", help="folder that holds the data sets")
    if command == "run":
        add("--keep", type=Path, metavar="FOLDER", help="keep checkpoints there, from which stopped runs go on")
    else:
        add("--output", type=Path, metavar="FILE", help="file of losses to write")
    args = parser.parse_intermixed_args(list(words))
    for name, number in (("--seeds", args.seeds), ("--workers", args.workers)):
        if number < 1:
            raise InputError(f"{name} must be 1 or more, got {number}")
    files = [Path(word) for word in itertools.takewhile(lambda word: word.endswith((".yaml", ".yml")), args.words)]
    if not files:
        raise InputError(f"name a configuration file, CONFIG.yaml, before the keys to change; got {args.words[0]!r}")

    from torchreid_ext.benchmark.grid import LOSSES, read_losses

    args.losses_file = args.losses_file or files[0].parent / LOSSES
    args.chosen = read_losses(args.losses_file, args.losses)
    grid = {"files": files, "seeds": range(args.seeds), "words": args.words[len(files) :], "varied": args.vary}
    return args, grid | {"root": args.root}


def _report(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("drsl-benchmark report", description="Tables and figures of results.")
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE.jsonl",
                        help="results of drsl-benchmark run; a .gz file too")  # fmt: skip
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="losses to report; default: all")
    parser.add_argument("--reference", metavar="NAME", help="loss to compare the others with; default: drsl")
    page = "a new page, or one that holds a report, which the new one replaces; default: print"
    parser.add_argument("--output", metavar="FILE.md", help=page)
    parser.add_argument("--figure", metavar="FILE.png", help="figure to draw: .png, .svg or .pdf")
    args = parser.parse_args(words)
    check_outputs({"--output": args.output, "--figure": args.figure}, map(str, args.results))

    from torchreid_ext.benchmark import grid, report

    if args.figure and Path(args.figure).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--figure {args.figure}: its name must end in .png, .svg or .pdf")
    for path in args.results:
        if not path.is_file():
            raise InputError(f"{path} does not exist; make it with drsl-benchmark run --results {path}")
    sections = report.sections([line for path in args.results for line in grid.read_results(path)], args.losses)
    text = report.report(sections, args.reference)
    if args.output:
        _insert(Path(args.output), text)
    else:
        print(text)
    if args.figure:
        report.draw(sections, Path(args.figure))
    return 0


def _insert(path: Path, text: str) -> None:
    """Writes a report to a new or empty file, or between the two comments ``BEGIN`` and ``END`` of a file. Raises
    InputError if a file that holds text lacks one of them."""
    content = path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else ""
    before, begin, rest = (content or f"{BEGIN}\n{END}\n").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{path} needs the lines {BEGIN} and {END}, between which the report goes")
    write_text(str(path), f"{before}{BEGIN}\n\n{text}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
