"""The video data set ``synthetic_tracklets``, which is drawn on first use and has the layout of MARS.

The drawing needs no internet. The names of folders and files are those of MARS, so a real copy can replace it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torchreid
from PIL import Image
from scipy.io import savemat
from tqdm import tqdm

from pml_drsl.checks import InputError
from torchreid_ext.data.synthetic.drawing import CAMERAS, draw_image, draw_scene, make_person
from torchreid_ext.data.synthetic.folder import check_recipe, draw_folder

NAME = "synthetic_tracklets"
VERSION = 1
"""Version of the recipe. Raise it with every change that changes a pixel, a name or a split."""
TRAIN_PIDS = range(1, 41)
TEST_PIDS = range(41, 65)
CAMERAS_PER_PERSON = 3
TRACKLETS_PER_CAMERA = 2
FRAMES = range(3, 7)
"""The possible numbers of frames of a tracklet."""

# Random streams are seeded by (seed, stream, ...). These numbers differ from the streams of synthetic_pedestrians, so
# that no person is in both data sets.
_SCENES, _PEOPLE = 3_000_000, 4_000_000

Tracklet = tuple[int, int, list[str]]
"""An identity, a camera (counted from 1) and the names of the frames."""


def _tracklets(seed: int, pids: range) -> Iterator[tuple[Tracklet, list[Image.Image]]]:
    """Yields every tracklet with its frames. Each has its own random stream."""
    scenes = [draw_scene(np.random.default_rng([seed, _SCENES, c]), camera) for c, camera in enumerate(CAMERAS)]
    for pid in pids:
        rng = np.random.default_rng([seed, _PEOPLE + pid])
        person = make_person(rng)
        for camera in rng.permutation(len(CAMERAS))[:CAMERAS_PER_PERSON].tolist():
            for track in range(1, TRACKLETS_PER_CAMERA + 1):
                frames = np.random.default_rng([seed, _PEOPLE + pid, camera, track])
                length = int(frames.choice(FRAMES))
                names = [f"{pid:04d}C{camera + 1}T{track:04d}F{frame:03d}.jpg" for frame in range(1, length + 1)]
                images = [draw_image(frames, person, CAMERAS[camera], scenes[camera]) for _ in names]
                yield (pid, camera + 1, names), images


def _write(folder: Path, part: str, pids: range, seed: int) -> None:
    """Writes the frames and the lists of a part (``train`` or ``test``) in the layout of MARS."""
    names: list[str] = []
    rows = []
    for (pid, camera, frames), images in _tracklets(seed, pids):
        home = folder / f"bbox_{part}" / f"{pid:04d}"
        home.mkdir(parents=True, exist_ok=True)
        for name, image in zip(frames, images, strict=True):
            image.save(home / name, quality=90)
        rows.append((len(names) + 1, len(names) + len(frames), pid, camera))
        names += frames
    info = folder / "info"
    info.mkdir(exist_ok=True)
    (info / f"{part}_name.txt").write_text("\n".join(names) + "\n")
    savemat(info / f"tracks_{part}_info.mat", {f"track_{part}_info": np.array(rows)})
    if part == "test":
        # The first tracklet of each identity and camera, counted from 1.
        queries = [index for index in range(len(rows)) if index % TRACKLETS_PER_CAMERA == 0]
        savemat(info / "query_IDX.mat", {"query_IDX": np.array(queries) + 1})


def draw_tracklets(folder: str | os.PathLike[str], seed: int = 0) -> None:
    """Draws the data set into a new ``folder``. If the drawing is interrupted, no folder is left.

    Args:
        folder: the folder to create; its parent is created where it is missing.
        seed: the people, the backgrounds and the images depend only on this seed.

    Raises:
        InputError: if ``seed`` is negative.
        OSError: if the folder cannot be written.
    """
    if seed < 0:
        raise InputError(f"seed={seed} must be 0 or more")

    def fill(drawing: Path) -> None:
        parts = {"train": TRAIN_PIDS, "test": TEST_PIDS}
        for part in tqdm(parts, f"drawing {NAME}", disable=None, delay=1, leave=False):
            _write(drawing, part, parts[part], seed)

    draw_folder(folder, _recipe(seed), fill)


def _recipe(seed: int) -> dict[str, Any]:
    return {"name": NAME, "version": VERSION, "seed": seed}


class SyntheticTracklets(torchreid.data.datasets.Mars):
    """torchreid's reader of MARS, for a folder that is drawn when it does not exist.

    There are 40 identities for training and 24 others for testing. Each identity is seen by 3 of 6 cameras, and has two
    tracklets for each of them. A tracklet has 3 to 6 frames, 64 pixels wide and 128 high. The first tracklet of each
    test identity and camera is a query.

    Args:
        root: the folder above ``synthetic_tracklets``; created where it is missing.
        seed: seed of the people, the backgrounds and the images.
        kwargs: the arguments of any torchreid video data set.

    Raises:
        InputError: if the folder was drawn by another recipe or seed.
        RuntimeError: if a file of MARS's layout is missing (from torchreid).
    """

    dataset_dir = NAME

    def __init__(self, root: str = "", seed: int = 0, **kwargs: Any) -> None:
        folder = Path(root).expanduser().absolute() / NAME
        if not folder.exists():
            draw_tracklets(folder, seed)
        check_recipe(folder, _recipe(seed), {"bbox_train": "MARS"})
        super().__init__(root=root, **kwargs)
