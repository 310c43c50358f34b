"""The two commands that a user would type after a training run, filled in with the paths of the run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from torchreid_ext.checkpoint.folder import BEST


def next_commands(save_dir: str, query: Sequence[str], gallery: Sequence[str]) -> str:
    """The commands, or an empty text where the run saved no best checkpoint.

    Args:
        save_dir: folder of the run.
        query: query images of a target.
        gallery: gallery images of the same target.
    """
    checkpoint = Path(save_dir, "model", BEST)
    if not checkpoint.is_file():
        return ""
    folders = {os.path.dirname(os.path.abspath(path)) for path in gallery}
    shared = Path(os.path.commonpath(folders))
    # Images on two disks share no folder but the root, which nobody wants to search: then one of the folders will do.
    folder = str(shared) if shared != Path(shared.anchor) and shared != Path.home() else min(folders)
    search = [str(checkpoint), "--gallery", _short(folder), "--query", _short(query[0])]
    search += ["--html", str(Path(save_dir, "search.html"))]
    export = [str(checkpoint), str(Path(save_dir, "model.onnx"))]
    lines = ["Next, look a person up in the gallery, and export the network:"]
    for words in (["drsl-search", *search], ["drsl-export", *export]):
        lines.append("  " + shlex.join([_program(words[0]), *words[1:]]))
    return "\n".join(lines)


def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _program(name: str) -> str:
    """How to start a command: beside drsl-train, where that is not on the path."""
    started = Path(sys.argv[0])
    beside = started.with_name(name)
    return str(beside) if started.name == "drsl-train" and started.parent != Path() and beside.exists() else name
