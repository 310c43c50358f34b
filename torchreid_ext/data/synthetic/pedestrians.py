"""The data set ``synthetic_pedestrians``, which is drawn on first use and has the layout of Market-1501.

The drawing needs no internet. The names of folders and files are those of Market-1501, so a real copy can replace it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torchreid
from PIL import Image
from tqdm import tqdm

from pml_drsl.checks import InputError
from torchreid_ext.data.synthetic.drawing import CAMERAS, draw_image, draw_scene, make_person
from torchreid_ext.data.synthetic.folder import check_recipe, draw_folder

NAME = "synthetic_pedestrians"
VERSION = 1
"""Version of the recipe. Raise it with every change that changes a pixel, a name or a split."""
LAYOUT = "Market-1501-v15.09.15"
TRAIN_PIDS = range(1, 101)
TEST_PIDS = range(101, 161)
CAMERAS_PER_PERSON = 5
SHOTS_PER_CAMERA = 2
QUERIES_PER_PERSON = 3
DISTRACTORS = 60

# Random streams are seeded by (seed, stream, ...). The stream of an identity is its pid, so these numbers are far away.
_SCENES, _DISTRACTORS = 1_000_000, 2_000_000
_FILE_NAME = re.compile(r"(?P<pid>-1|\d+)_c(?P<camid>\d)")


def _pictures(seed: int) -> Iterator[tuple[str, Image.Image]]:
    """Yields the name (``FOLDER/NAME.jpg``) and the image of every picture. Each has its own random stream."""
    scenes = [draw_scene(np.random.default_rng([seed, _SCENES, c]), camera) for c, camera in enumerate(CAMERAS)]
    for pid in (*TRAIN_PIDS, *TEST_PIDS):
        rng = np.random.default_rng([seed, pid])
        person = make_person(rng)
        visits = rng.permutation(len(CAMERAS))[:CAMERAS_PER_PERSON].tolist()
        for visit, camera in enumerate(visits):
            for shot in range(1, SHOTS_PER_CAMERA + 1):
                if pid in TRAIN_PIDS:
                    folder = "bounding_box_train"
                else:
                    folder = "query" if visit < QUERIES_PER_PERSON and shot == 1 else "bounding_box_test"
                image_rng = np.random.default_rng([seed, pid, camera, shot])
                name = f"{pid:04d}_c{camera + 1}s1_{pid * 100 + visit:06d}_{shot:02d}.jpg"
                yield f"{folder}/{name}", draw_image(image_rng, person, CAMERAS[camera], scenes[camera])
    for number in range(DISTRACTORS):
        rng = np.random.default_rng([seed, _DISTRACTORS, number])
        camera = number % len(CAMERAS)
        # Half of the distractors are people who are in no query; the other half are false detections.
        somebody = make_person(rng) if number < DISTRACTORS // 2 else None
        name = f"0000_c{camera + 1}s1_{number:06d}_01.jpg"
        yield f"bounding_box_test/{name}", draw_image(rng, somebody, CAMERAS[camera], scenes[camera])


def draw_pedestrians(folder: str | os.PathLike[str], seed: int = 0) -> None:
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
    total = (len(TRAIN_PIDS) + len(TEST_PIDS)) * CAMERAS_PER_PERSON * SHOTS_PER_CAMERA + DISTRACTORS

    def fill(drawing: Path) -> None:
        for split in ("bounding_box_train", "query", "bounding_box_test"):
            (drawing / LAYOUT / split).mkdir(parents=True)
        # disable=None: no bar unless stderr is a terminal.
        for name, image in tqdm(_pictures(seed), f"drawing {NAME}", total, disable=None, delay=1, leave=False):
            image.save(drawing / LAYOUT / name, quality=90)

    draw_folder(folder, _recipe(seed), fill)


def _recipe(seed: int) -> dict[str, Any]:
    return {"name": NAME, "version": VERSION, "seed": seed}


class SyntheticPedestrians(torchreid.data.datasets.Market1501):
    """torchreid's reader of Market-1501, for a folder that is drawn when it does not exist.

    There are 100 identities for training and 60 others for testing. Each identity is seen by 5 of 6 cameras, twice by
    each camera. Each test identity has three queries. The gallery contains 60 distractors (pid 0). The 1660 images are
    64 pixels wide and 128 high.

    Args:
        root: the folder above ``synthetic_pedestrians``; created where it is missing.
        seed: seed of the people, the backgrounds and the images.
        kwargs: the arguments of any torchreid image data set.

    Raises:
        InputError: if the folder was drawn by another recipe or seed, or if a file is not named as in Market-1501.
        RuntimeError: if a folder of Market-1501's layout is missing (from torchreid).
    """

    dataset_dir = NAME

    def __init__(self, root: str = "", seed: int = 0, **kwargs: Any) -> None:
        folder = Path(root).expanduser().absolute() / NAME
        if not folder.exists():
            draw_pedestrians(folder, seed)
        check_recipe(folder, _recipe(seed), {LAYOUT: "Market-1501", "bounding_box_train": "Market-1501"})
        super().__init__(root=root, **kwargs)

    def process_dir(self, dir_path: str, relabel: bool = False) -> list[tuple[str, int, int]]:
        """Lists a folder's images as (path, pid, camid from 0), sorted by name; ``relabel`` makes pids 0..n-1.

        torchreid's own method takes the files in the order of the file system. It also searches for the pid in the
        whole path, so that a parent folder named ``3_c1`` would give the identity.
        """
        rows = []
        for path in sorted(Path(dir_path).glob("*.jpg")):
            found = _FILE_NAME.match(path.name)
            if found is None or not 1 <= int(found["camid"]) <= 6:
                raise InputError(f"{path} is not named as in Market-1501, such as 0002_c1s1_000451_03.jpg")
            if int(found["pid"]) != -1:
                rows.append((str(path), int(found["pid"]), int(found["camid"]) - 1))
        if relabel:
            labels = {pid: label for label, pid in enumerate(sorted({pid for _, pid, _ in rows}))}
            rows = [(path, labels[pid], camid) for path, pid, camid in rows]
        return rows
