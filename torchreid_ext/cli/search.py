"""Looks images up in a gallery with a trained network, and shows the nearest gallery images.

The checkpoint of a run says which network it is, and how images are resized, normalised and compared. Weights of
torchreid's zoo need the name of the network: --model osnet_x0_25. The gallery is folders, image files, CSV
files (their split gallery) and feature files of drsl-extract. Without --gallery and --index it is the gallery of the
run's own test. --names says how the names of images carry identities and cameras. Known identities and cameras are
shown, and a match is marked right or wrong where its identity and that of the query are known.

With --index, the features of the gallery are kept in a file, and only images that are new are read the next time. Other
commands that change the file meanwhile wait.

--serve opens a page on this machine, which looks up the photos that are dropped on it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pml_drsl.checks import InputError
from pml_drsl.console import guarded, say, write_text
from torchreid_ext.cli import console

if TYPE_CHECKING:
    from torchreid_ext.images import Row
    from torchreid_ext.search.features import ExtractedSet
    from torchreid_ext.search.searcher import Searcher

PART = 1000  # new images after which an index is written, so that a damaged image, or Ctrl-C, loses no others

EPILOG = """examples:
  drsl-search log/demo --query photos/anna/hall_1.jpg                     among the test images of a run
  drsl-search CHECKPOINT --gallery photos --query photos/anna/hall_1.jpg --names folder
  drsl-search osnet_x0_25_msmt17.pth --model osnet_x0_25 --gallery photos --query me.jpg
  drsl-search CHECKPOINT --gallery photos --query street.jpg --crop 120 40 210 300 --html found.html
  drsl-search CHECKPOINT --gallery photos --index photos.index                      makes the index
  drsl-search CHECKPOINT --index photos.index --query street.jpg --top 5 --json -   searches it
  drsl-search CHECKPOINT --index photos.index --gallery new_photos --remove '*/anna/*' --prune
  drsl-search CHECKPOINT --gallery features.npz --query street.jpg --rerank
  drsl-search CHECKPOINT --index photos.index --serve"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status, which :func:`pml_drsl.console.guarded` explains."""
    parser = console.parser("drsl-search", __doc__, EPILOG)
    add = parser.add_argument
    add("--gallery", nargs="+", default=[], metavar="SOURCE", help="folders, images, CSV files, .npz of drsl-extract")
    add("--query", nargs="+", default=[], metavar="IMAGE", help="images to look up, folders or CSV files")
    add("--root", metavar="FOLDER", help="folder of the run's data sets, for a search without --gallery and --index; "
        "default: where the run had them")  # fmt: skip
    add("--top", type=int, default=10, metavar="K", help="gallery images to show; default: %(default)s")
    add("--rerank", action="store_true", help="re-rank by k-reciprocal neighbours (slower)")
    add("--crop", nargs=4, type=int, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="use this part of the query, in pixels: a person in a larger picture")  # fmt: skip
    add("--html", metavar="PAGE", help="write one page with all pictures in it, for any browser")
    add("--json", metavar="FILE", help="write what was found as JSON; - for stdout")
    add("--index", metavar="FILE", help="keep the features of the gallery in this file")
    add("--remove", nargs="+", default=[], metavar="PATTERN",
        help="images to remove from the index: their paths as they are printed, or '*/anna/*'")  # fmt: skip
    add("--prune", action="store_true", help="remove images from the index whose files are gone")
    add("--serve", nargs="?", type=int, const=7861, metavar="PORT",
        help="open a page that looks photos up, at this port; 0: a free one; default: %(const)s")  # fmt: skip
    add("--host", help="address of the page; 0.0.0.0 lets everybody in the network search; default: 127.0.0.1")
    console.add_device(parser)
    args = parser.parse_args(arguments)
    extra = "reid" if args.serve is None else "reid,serve"
    return guarded("drsl-search", lambda: run(args), [args.index, args.json, args.html], extra=extra)


def run(args: argparse.Namespace) -> None:
    """Makes or opens the gallery, searches it or serves a page, prints and writes what was found; raises InputError."""
    _check(args)
    if args.serve is None:
        _search(args)
        return
    from torchreid_ext.search.serve import listen, serve

    # A port that is in use ends the command before the gallery is read.
    with listen(args.host or "127.0.0.1", args.serve) as listener:
        searcher, _ = _opened(args)
        serve(listener, searcher, args.rerank, args.top)


def _search(args: argparse.Namespace) -> None:
    from torchreid_ext.evaluation.page import write_pages
    from torchreid_ext.search import searcher as search

    # Text for people goes to stderr where stdout is JSON.
    with contextlib.redirect_stdout(sys.stderr if args.json == "-" else sys.stdout):
        searcher, asked = _opened(args)
        if asked is None:
            return
        # A query that the gallery holds is of whom the gallery says: the gallery's folders may carry identities.
        known = {entry.path: entry for entry in searcher.gallery.entries if entry.identity}
        queries = [known.get(query.path, query) for query in asked.entries]
        # Two more, because the gallery may hold the query's own image, and a link to it.
        found = search.others(queries, searcher.search_features(asked.features, args.top + 2, args.rerank), args.top)
        rows = search.rankings(queries, args.crop, found)
        caption = search.caption(searcher, args.rerank)
        page = f"\n\nThe page to look at is {str(write_pages(args.html, rows, caption)[0])!r}" if args.html else ""
        say(f"{caption}\n\n{search.as_text(rows)}{page}")
    if args.json:  # The escapes of JSON keep names that are no UTF-8, on terminals of any encoding.
        write_text(args.json, json.dumps(search.as_dict(searcher, rows, args.rerank), indent=2) + "\n")


def _opened(args: argparse.Namespace) -> tuple[Searcher, ExtractedSet | None]:
    """The searcher with its gallery, which is kept if --index says so, and the queries with their features, if any."""
    from torchreid_ext.images import Table
    from torchreid_ext.runtime.files import locked
    from torchreid_ext.search import features
    from torchreid_ext.search.searcher import Searcher
    from torchreid_ext.search.sources import absolute, list_queries, test_images

    changes = args.index and (args.gallery or args.remove or args.prune)
    with locked(args.index) if changes else contextlib.nullcontext():
        kept = args.index if args.index and Path(args.index).exists() else None
        given = {name: getattr(args, name) for name in ("model", "config_file", "device", "batch_size", "names")}
        searcher = Searcher(args.checkpoint, index=kept, **given)
        model = searcher.model
        of_run = Table() if args.gallery or args.index else test_images(model.config, args.root, model.people)
        tested = {row.path: row for row in map(absolute, of_run.rows)}
        looked_up = list_queries(args.query, args.names)
        if looked_up.left_out:
            say(f"queries {looked_up.about_left_out()}")
        queries = [tested.get(row.path, row) for row in map(absolute, looked_up.rows)]
        options = console.extraction(args) | {"description": "queries", "crop": args.crop}
        asked = features.extract_files(model, queries, **options) if queries else None
        removed, added = _remove(args, searcher), _add(args, searcher, of_run.gallery)
        if unwritten := changes and (added or kept is None):
            searcher.gallery.save(args.index)
        if removed or unwritten:
            say(f"The index of {len(searcher):,} images is in {args.index!r}")
    return searcher, asked


def _check(args: argparse.Namespace) -> None:
    """Raises InputError for options that cannot go together, before any work is done."""
    if args.serve is not None and (args.query or args.crop or args.html or args.json):
        raise InputError("--serve searches on its page: leave out --query, --crop, --html and --json")
    if args.host and args.serve is None:
        raise InputError("--host is the address of the page: give --serve too")
    changes = args.gallery or args.remove or args.prune
    if not args.query and args.serve is None:
        if not (args.index and changes):
            change = "--index FILE with --gallery, --remove or --prune"
            raise InputError(f"there is nothing to do: give --query IMAGE, --serve, or {change}")
        for option in ("html", "json", "crop", "rerank"):
            if getattr(args, option):
                raise InputError(f"--{option} is for a search: give --query IMAGE too, or leave it out")
    _check_gallery(args)
    for option in ("remove", "prune"):
        if getattr(args, option) and not args.index:
            raise InputError(f"--{option} removes images from an index: give --index FILE")
    if args.top < 1:
        raise InputError(f"--top {args.top}: give 1 or more")
    console.check_sources(args.names, [*args.gallery, *args.query])
    from torchreid_ext.search.model import find_checkpoint  # This imports torchreid, for which no mistake has to wait.

    # An index that is only read may stand where nothing can be written.
    read, written = (None, args.index) if changes else (args.index, None)
    inputs = [find_checkpoint(args.checkpoint), args.config_file, *args.query, *args.gallery, read]
    console.check_outputs({"--json": args.json, "--html": args.html, "--index": written}, inputs)


def _check_gallery(args: argparse.Namespace) -> None:
    if args.index and not args.gallery and not Path(args.index).is_file():
        fault = "is a folder" if Path(args.index).is_dir() else "does not exist"
        raise InputError(f"there is no gallery to search: give --gallery FOLDER; the index {args.index!r} {fault}")
    if args.model and not (args.gallery or args.index):
        raise InputError("weights that --model names have no run, and so no test images: give --gallery FOLDER")
    if args.root and (args.gallery or args.index):
        raise InputError("--root is for the test images of the run itself: leave it out beside --gallery and --index")


def _remove(args: argparse.Namespace, searcher: Searcher) -> bool:
    """Removes images from the index, writes it and says so; returns whether any was removed."""
    removed = searcher.remove(args.remove) if args.remove else 0
    gone = searcher.prune() if args.prune else 0
    if removed or gone:
        searcher.gallery.save(args.index)
    if args.remove:
        say(f"Removed {removed:,} images from the index")
    if args.prune:
        say(f"Removed {gone:,} images from the index, whose files are gone")
    return bool(removed or gone)


def _add(args: argparse.Namespace, searcher: Searcher, of_run: Sequence[Row]) -> bool:
    """Adds images, or those of the run's own test, to the gallery; returns whether there were any to add."""
    from torchreid_ext.images import Table
    from torchreid_ext.search import features
    from torchreid_ext.search.sources import absolute, list_sources

    added, left_out = False, Table()
    listed = [absolute(row) for row in of_run]
    for source in args.gallery:
        if source.lower().endswith(".npz"):
            held = features.read_gallery(source, searcher.model)
            places = {absolute(entry): row for row, entry in enumerate(held.entries)}
            new = [entry for entry in places if entry.path not in searcher.gallery]
            searcher.gallery.add(new, held.features[[places[entry] for entry in new]])
            added |= bool(new)
        else:
            table = list_sources([source], args.names)
            listed += map(absolute, table.gallery or table.query)
            left_out.leave_out_all(table)
    if left_out.left_out:
        say(left_out.about_left_out())
    # An image may be given twice, by itself and with its folder, which may alone say whom it shows.
    known = {entry.path: entry for entry in listed if entry.identity}
    fresh = {entry.path: known.get(entry.path, entry) for entry in listed if entry.path not in searcher.gallery}
    entries = list(fresh.values())
    added |= bool(entries)
    while entries:
        options = console.extraction(args) | {"description": f"gallery, {len(entries):,} images left"}
        # The whole index is written after every part: parts that grow with it keep the time for this short.
        size = max(PART, len(searcher) // 10) if args.index else len(entries)
        part, entries = entries[:size], entries[size:]
        others = bool(entries or len(searcher))
        read = features.extract_files(searcher.model, part, may_be_empty=others, **options)
        if read.entries:
            searcher.gallery.add(read.entries, read.features)
        if read.entries and entries:
            searcher.gallery.save(args.index)
    return added


if __name__ == "__main__":
    sys.exit(main())
