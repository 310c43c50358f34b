"""Draws the folder of a data set on first use, and checks which recipe an existing folder was drawn from."""

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
    """Creates ``folder`` with all its files. If the drawing is interrupted, no folder is left.

    The files are drawn in a temporary folder beside ``folder``, which is renamed when it is complete. If another
    process was faster, its folder is kept and the folder of this process is removed.

    Args:
        folder: the folder to create; its parent is created where it is missing.
        recipe: the parameters of the drawing. They are written into the folder for :func:`check_recipe`.
        fill: function that draws the files into an empty folder.

    Raises:
        OSError: if the folder cannot be written.
    """
    destination = Path(folder)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as temporary:
        # The permissions of a temporary folder exclude other users. A folder inside it has the usual permissions.
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

    A folder without a recipe was not drawn by this package, because a drawn folder always has a recipe. It contains the
    user's own data. They are used, with a warning. A folder with another recipe is refused. It is not drawn again,
    because another process may be reading it.

    Args:
        folder: the folder.
        recipe: the expected parameters.
        own: names of subfolders that identify the user's own data, with the layout that each of them belongs to.

    Raises:
        InputError: if the recipe differs or cannot be read, or if the folder contains neither a recipe nor a subfolder
            of ``own``.
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
