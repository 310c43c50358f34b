"""Folders of small photos, one folder per person: FOLDER/PERSON/CAMERA_SHOT.png."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image


def draw(path: Path) -> Path:
    """Writes a small image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 16), (len(path.name), 60, 90)).save(path)
    return path


def make_folder(folder: Path, pids: Iterable[str], cameras: Iterable[str], shots: int = 2) -> Path:
    """Draws ``shots`` images of each person by each camera."""
    for pid in pids:
        for camera in cameras:
            for shot in range(shots):
                draw(folder / pid / f"{camera}_{shot}.png")
    return folder


def people(items: Iterable[tuple[Any, ...]]) -> set[str]:
    """The names of the persons that the items of a data set show."""
    return {Path(item[0]).parent.name for item in items}
