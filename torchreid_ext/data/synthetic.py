"""The data sets ``synthetic_pedestrians`` (images) and ``synthetic_tracklets`` (video), which are drawn on first use.

The names of folders and files are those of Market-1501 and MARS.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torchreid
from PIL import Image
from scipy.io import savemat
from tqdm import tqdm

from torchreid_ext.data.drawing import CAMERAS, draw_image, draw_scene, make_person

LAYOUT = "Market-1501-v15.09.15"
PEDESTRIANS = {"train": range(1, 101), "test": range(101, 161)}  # the identities of ``synthetic_pedestrians``
CAMERAS_PER_PERSON, SHOTS_PER_CAMERA, QUERIES_PER_PERSON, DISTRACTORS = 5, 2, 3, 60
TRACKED = {"train": range(1, 41), "test": range(41, 65)}  # the identities of ``synthetic_tracklets``
CAMERAS_PER_TRACKED, TRACKLETS_PER_CAMERA, FRAMES = 3, 2, range(3, 7)

# Random streams are seeded by (0, stream, ...). The stream of a pedestrian is its pid; no other is near these.
_SCENES, _DISTRACTORS, _VIDEO_SCENES, _TRACKED = 1_000_000, 2_000_000, 3_000_000, 4_000_000


class _Drawn:
    """Mixed into a reader of torchreid: the folder of the data set below ``root`` is drawn when it does not exist.

    Raises torchreid's RuntimeError if a folder is missing.
    """

    # Name of the data set and of its folder. A change of a pixel, a name or a split needs another name of the folder.
    dataset_dir: str
    _fill: Callable[[Path], None]  # draws the files into an empty folder

    def __init__(self, root: str = "", **kwargs: Any) -> None:
        folder = Path(root).expanduser().absolute() / self.dataset_dir
        if not folder.exists():
            self.draw(folder)
        super().__init__(root=root, **kwargs)  # type: ignore[call-arg]

    @classmethod
    def draw(cls, folder: Path) -> None:
        """Draws the data set, which is always the same, into a new ``folder``, whole or not at all. If another process
        was faster, its folder is kept. Raises OSError if it cannot write."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            # A temporary folder excludes other users. A folder inside it has the usual permissions.
            drawing = Path(temporary, folder.name)
            drawing.mkdir()
            cls._fill(drawing)
            try:
                drawing.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise


def _rng(*stream: int) -> np.random.Generator:
    return np.random.default_rng([0, *stream])


def _scenes(stream: int) -> list[Image.Image]:
    return [draw_scene(_rng(stream, c), camera) for c, camera in enumerate(CAMERAS)]


def _pictures() -> Iterator[tuple[str, Image.Image]]:
    """Yields the name (``FOLDER/NAME.jpg``) and the image of every picture."""
    scenes = _scenes(_SCENES)
    for part, pid in ((part, pid) for part, pids in PEDESTRIANS.items() for pid in pids):
        rng = _rng(pid)
        person = make_person(rng)
        for visit, camera in enumerate(rng.permutation(len(CAMERAS))[:CAMERAS_PER_PERSON].tolist()):
            for shot in range(1, SHOTS_PER_CAMERA + 1):
                is_query = part == "test" and visit < QUERIES_PER_PERSON and shot == 1
                folder = "query" if is_query else f"bounding_box_{part}"
                image_rng = _rng(pid, camera, shot)
                name = f"{pid:04d}_c{camera + 1}s1_{pid * 100 + visit:06d}_{shot:02d}.jpg"
                yield f"{folder}/{name}", draw_image(image_rng, person, CAMERAS[camera], scenes[camera])
    for number in range(DISTRACTORS):
        rng = _rng(_DISTRACTORS, number)
        camera = number % len(CAMERAS)
        # Half of the distractors are people who are in no query; the other half are false detections.
        somebody = make_person(rng) if number < DISTRACTORS // 2 else None
        name = f"0000_c{camera + 1}s1_{number:06d}_01.jpg"
        yield f"bounding_box_test/{name}", draw_image(rng, somebody, CAMERAS[camera], scenes[camera])


class SyntheticPedestrians(_Drawn, torchreid.data.datasets.Market1501):
    """torchreid's reader of Market-1501, for a folder that is drawn when it does not exist.

    Each of 100 identities for training and 60 for testing is seen by 5 of 6 cameras, twice by each. A test identity has
    three queries, and the gallery 60 distractors (pid 0): 1660 images, 64 pixels wide and 128 high.
    """

    dataset_dir = "synthetic_pedestrians"

    @staticmethod
    def _fill(drawing: Path) -> None:
        for split in ("bounding_box_train", "query", "bounding_box_test"):
            (drawing / LAYOUT / split).mkdir(parents=True)
        total = sum(map(len, PEDESTRIANS.values())) * CAMERAS_PER_PERSON * SHOTS_PER_CAMERA + DISTRACTORS
        # disable=None: no bar unless stderr is a terminal.
        for name, image in tqdm(_pictures(), "drawing pedestrians", total, disable=None, delay=1, leave=False):
            image.save(drawing / LAYOUT / name, quality=90)

    def process_dir(self, dir_path: str, relabel: bool = False) -> list[tuple[str, int, int]]:
        """Lists images as (path, pid, camid), sorted by name; torchreid has the order of the file system."""
        return sorted(super().process_dir(dir_path, relabel))


def _tracklets(pids: range) -> Iterator[tuple[int, int, dict[str, Image.Image]]]:
    """Yields every tracklet: its identity, its camera from 1, and its frames by their names."""
    scenes = _scenes(_VIDEO_SCENES)
    for pid in pids:
        rng = _rng(_TRACKED + pid)
        person = make_person(rng)
        for camera in rng.permutation(len(CAMERAS))[:CAMERAS_PER_TRACKED].tolist():
            for track in range(1, TRACKLETS_PER_CAMERA + 1):
                frames = _rng(_TRACKED + pid, camera, track)
                numbers = range(1, int(frames.choice(FRAMES)) + 1)
                names = [f"{pid:04d}C{camera + 1}T{track:04d}F{number:03d}.jpg" for number in numbers]
                images = {name: draw_image(frames, person, CAMERAS[camera], scenes[camera]) for name in names}
                yield pid, camera + 1, images


class SyntheticTracklets(_Drawn, torchreid.data.datasets.Mars):
    """torchreid's reader of MARS, for a folder that is drawn when it does not exist.

    Each of 40 identities for training and 24 for testing is seen by 3 of 6 cameras, in two tracklets each, of 3 to 6
    frames, 64 pixels wide and 128 high. The first tracklet of each test identity and camera is a query.
    """

    dataset_dir = "synthetic_tracklets"

    @staticmethod
    def _fill(drawing: Path) -> None:
        info = drawing / "info"
        info.mkdir()
        for part, pids in tqdm(TRACKED.items(), "drawing tracklets", disable=None, delay=1, leave=False):
            names: list[str] = []
            rows = []
            for pid, camera, frames in _tracklets(pids):
                home = drawing / f"bbox_{part}" / f"{pid:04d}"
                home.mkdir(parents=True, exist_ok=True)
                for name, image in frames.items():
                    image.save(home / name, quality=90)
                rows.append((len(names) + 1, len(names) + len(frames), pid, camera))
                names += frames
            (info / f"{part}_name.txt").write_text("\n".join(names) + "\n")
            savemat(info / f"tracks_{part}_info.mat", {f"track_{part}_info": np.array(rows)})
        # The first tracklet of each test identity and camera, counted from 1.
        savemat(info / "query_IDX.mat", {"query_IDX": np.arange(1, len(rows) + 1, TRACKLETS_PER_CAMERA)})
