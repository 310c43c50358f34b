"""Looks images up in a gallery with a trained network, and shows the nearest gallery images.

The checkpoint alone says which network it is, and how images are resized, normalised and compared. The gallery is a
folder of images, a CSV file or a features file of drsl-extract. Where names carry identities and cameras, as in
0002_c1s1_000451_03.jpg or anna/hall_1.jpg, they are shown.

With --index, the features of the gallery are kept in a file, and only images that are new are read the next time.
Below a million images the search is exact. Above, it reads a part of the index, and how much that finds is measured on
a sample and printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pml_drsl.checks import InputError
from torchreid_ext.cli import console
from torchreid_ext.runtime.files import replacing
from torchreid_ext.search import page, results, sources
from torchreid_ext.search.extraction import extract_files
from torchreid_ext.search.feature_file import read_gallery
from torchreid_ext.search.results import Ranked
from torchreid_ext.search.searcher import Searcher
from torchreid_ext.search.sources import Entry, named

EXAMPLES = """
    drsl-search CHECKPOINT --gallery photos --query photos/anna/hall_1.jpg
    drsl-search CHECKPOINT --gallery photos --query street.jpg --crop 120 40 210 300 --html found.html
    drsl-search CHECKPOINT --gallery photos --index photos.index                      makes the index
    drsl-search CHECKPOINT --index photos.index --query street.jpg --top 5 --json -   searches it
    drsl-search CHECKPOINT --index photos.index --gallery new_photos --remove '*/anna/*'
    drsl-search CHECKPOINT --gallery features.npz --query street.jpg --rerank
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status: 0, 2 for bad input, which stderr explains, or 130."""
    args = _parser().parse_args(arguments)
    return console.guarded("drsl-search", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Makes or opens the gallery, searches it, and prints and writes what was found.

    Raises:
        InputError: for bad input.
    """
    _check(args)
    kept = args.index if args.index and Path(args.index).exists() else None
    searcher = Searcher(args.checkpoint, config_file=args.config_file, index=kept, device=args.device)
    # Text for people goes to stderr where stdout is JSON.
    say = sys.stderr if args.json == "-" else sys.stdout
    queries = [named(os.path.abspath(path)) for path in args.query]
    features = searcher.extract([query.path for query in queries], args.crop) if queries else None
    changed = _update(args, searcher, say)
    if args.index and (changed or kept is None):
        searcher.save(args.index)
        print(f"The index of {len(searcher):,} images is in {args.index!r}", file=say)
    if searcher.gallery.recall is not None and not args.rerank:
        print(f"The {searcher.gallery.recall}", file=say)
    if features is None:
        return
    found = searcher.search_features(features, args.top, args.rerank)
    rows = [Ranked(query, args.crop, matches) for query, matches in zip(queries, found, strict=True)]
    caption = results.caption(searcher, args.rerank)
    print(f"{caption}\n\n{results.as_text(rows)}", file=say)
    text = json.dumps(results.as_dict(searcher, rows, args.rerank), indent=2, ensure_ascii=False) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    elif args.json:
        with replacing(args.json) as file:
            file.write(text.encode())
    if args.html:
        with replacing(args.html) as file:
            file.write(page.render(rows, caption).encode())
        print(f"\nThe page to look at is {args.html!r}", file=say)


def _check(args: argparse.Namespace) -> None:
    """Raises InputError for options that cannot go together, before any work is done."""
    if not args.query and not args.index:
        raise InputError("there is nothing to do: give --query IMAGE to search, or --index FILE to make an index")
    if not args.gallery and not (args.index and Path(args.index).is_file()):
        at = f"; the index {args.index!r} does not exist" if args.index else ""
        raise InputError(f"there is no gallery to search: give --gallery FOLDER{at}")
    if args.remove and not args.index:
        raise InputError("--remove removes images from an index: give --index FILE")
    if args.top < 1:
        raise InputError(f"--top {args.top}: give 1 or more")
    for name in ("html", "json", "index"):
        path = getattr(args, name)
        if path and path != "-" and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise InputError(f"--{name} {path}: that is not a file in a folder that exists")


def _update(args: argparse.Namespace, searcher: Searcher, say: object) -> bool:
    """Removes and adds images of the gallery; returns whether anything changed."""
    changed = False
    if args.remove:
        count = searcher.remove(args.remove)
        print(f"Removed {count} images from the index", file=say)  # type: ignore[call-overload]
        changed = True
    for source in args.gallery:
        if source.lower().endswith(".npz"):
            known = read_gallery(source, searcher.model)
            new = [index for index, entry in enumerate(known.entries) if entry.path not in searcher.gallery]
            entries, features = [known.entries[index] for index in new], known.features[new]
        else:
            found = sources.list_images([source])
            absolute = [Entry(os.path.abspath(e.path), e.identity, e.camera) for e in found.gallery or found.query]
            entries = [entry for entry in absolute if entry.path not in searcher.gallery]
            if not entries:
                continue
            read = extract_files(
                searcher.model,
                [entry.path for entry in entries],
                batch_size=args.batch_size,
                workers=args.workers,
                skip_damaged=args.skip_damaged,
                description="gallery",
            )
            for reason in read.damaged:
                print(f"left out: {reason}", file=say)  # type: ignore[call-overload]
            entries, features = [entries[index] for index in read.kept], read.features
        if entries:
            searcher.add_features(entries, features)
            changed = True
    return changed


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("drsl-search", __doc__, EXAMPLES)
    parser.add_argument(
        "--gallery", nargs="+", default=[], metavar="SOURCE", help="folders, CSV files or .npz files of drsl-extract"
    )
    parser.add_argument("--query", nargs="+", default=[], metavar="IMAGE", help="images to look up")
    parser.add_argument("--top", type=int, default=10, metavar="K", help="gallery images to show (%(default)s)")
    parser.add_argument("--rerank", action="store_true", help="re-rank by k-reciprocal neighbours (slower)")
    parser.add_argument(
        "--crop",
        nargs=4,
        type=int,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="use this part of the query, in pixels: a person in a larger picture",
    )
    parser.add_argument("--html", metavar="PAGE", help="write one page with all pictures in it, for any browser")
    parser.add_argument("--json", metavar="FILE", help="write what was found as JSON; - for stdout")
    parser.add_argument("--index", metavar="FILE", help="keep the features of the gallery in this file")
    parser.add_argument(
        "--remove", nargs="+", default=[], metavar="PATTERN", help="images to remove from the index: '*/anna/*'"
    )
    console.add_device(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
