"""A data set that is drawn on first use: whole or not at all, and never mistaken for another."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pml_drsl.checks import InputError

RECIPE_FILE = "recipe.json"


def draw_folder(folder: str | os.PathLike[str], recipe: Mapping[str, Any], fill: Callable[[Path], None]) -> None:
    """Makes ``folder``, all of it or, when interrupted, nothing.

    The drawing happens in a temporary folder beside ``folder``, which is renamed when it is complete. Where another
    process was faster, its folder stays and this one's is dropped.

    Args:
        folder: the folder to create; its parent is created where it is missing.
        recipe: what it is drawn from, written into it for :func:`check_recipe`.
        fill: draws into an empty folder.

    Raises:
        OSError: if the folder cannot be written.
    """
    destination = Path(folder)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as temporary:
        # A folder inside the temporary one, since that is private to its owner and would stay so.
        drawing = Path(temporary, destination.name)
        drawing.mkdir()
        fill(drawing)
        (drawing / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        try:
            drawing.rename(destination)
        except OSError:
            if not destination.is_dir():
                raise


def check_recipe(folder: str | os.PathLike[str], recipe: Mapping[str, Any], own: Mapping[str, str]) -> None:
    """Checks that a folder was drawn from a recipe.

    A folder without a recipe was not drawn here (a drawing appears whole, with its recipe): somebody put their own
    data there. They are used, with a warning. A folder drawn otherwise is refused instead of drawn again, because
    another process may be reading it.

    Args:
        folder: the folder.
        recipe: what it should be drawn from.
        own: subfolders that tell somebody's own data, and what layout each is of.

    Raises:
        InputError: if the recipe is another, or cannot be read, or if the folder holds neither a recipe nor one of
            ``own``.
    """
    file = Path(folder, RECIPE_FILE)
    if not file.exists():
        layouts = [layout for name, layout in own.items() if Path(folder, name).is_dir()]
        if not layouts:
            raise InputError(
                f"{folder} has neither {RECIPE_FILE} nor {next(iter(own))}: delete it to have it drawn again"
            )
        warnings.warn(f"{folder} has no {RECIPE_FILE}: it is read as your own in {layouts[0]}'s layout", stacklevel=2)
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}): delete {folder} to have it drawn again") from error
    if found != dict(recipe):
        raise InputError(
            f"{folder} was drawn as {found}, but {dict(recipe)} is wanted: delete it to have it drawn again, "
            "or choose another data.root"
        )
