"""The drawn data set has the layout of Market-1501, disjoint identities and reproducible pixels, and is complete."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchreid
from PIL import Image
from toy_data import draw_tracklets

import torchreid_ext
from torchreid_ext.data import synthetic
from torchreid_ext.data.drawing import CAMERAS, draw_image, draw_scene, make_person
from torchreid_ext.data.synthetic import LAYOUT, SyntheticPedestrians, SyntheticTracklets

SPLITS = ("bounding_box_train", "query", "bounding_box_test")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder with the complete drawn data set."""
    folder = tmp_path_factory.mktemp("drawn")
    SyntheticPedestrians.draw(folder / "synthetic_pedestrians")
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws only six identities and two distractors, for tests of the procedure."""
    monkeypatch.setattr(synthetic, "PEDESTRIANS", {"train": range(1, 4), "test": range(4, 7)})
    monkeypatch.setattr(synthetic, "DISTRACTORS", 2)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def parse(root: Path, split: str) -> list[tuple[int, int]]:
    form = re.compile(r"(\d{4})_c([1-6])s\d_\d{6}_\d\d\.jpg")
    names = [path.name for path in (root / "synthetic_pedestrians" / LAYOUT / split).iterdir()]
    return [tuple(map(int, form.fullmatch(name).groups())) for name in names]  # type: ignore[union-attr, misc]


class TestSet:
    def test_splits(self, root: Path) -> None:
        train, query, gallery = (parse(root, split) for split in SPLITS)
        assert len({pid for pid, _ in train}) == 100 and len(train) == 1000
        assert len({pid for pid, _ in query}) == 60 and len(query) == 180 == len(set(query))
        people = {pid for pid, _ in gallery} - {0}
        assert people == {pid for pid, _ in query} and not people & {pid for pid, _ in train}
        assert Counter(pid for pid, _ in gallery)[0] == 60
        for pid, camera in query:
            assert any(other == pid and at != camera for other, at in gallery)
        assert {camera for _, camera in train} == {camera for _, camera in gallery} == {1, 2, 3, 4, 5, 6}

    def test_images_are_rgb_of_one_size_and_all_different(self, root: Path) -> None:
        files = list((root / "synthetic_pedestrians").rglob("*.jpg"))
        assert len({path.read_bytes() for path in files}) == len({path.name for path in files}) == 1000 + 180 + 420 + 60
        for path in files[::100]:
            with Image.open(path) as image:
                assert (image.size, image.mode, image.format) == ((64, 128), "RGB", "JPEG")

    def test_torchreids_own_reader_finds_the_same(self, root: Path) -> None:
        (root / "market1501").symlink_to(root / "synthetic_pedestrians")
        theirs = torchreid.data.datasets.init_image_dataset("market1501", root=str(root), verbose=False)
        ours = torchreid.data.datasets.init_image_dataset("synthetic_pedestrians", root=str(root), verbose=False)
        assert isinstance(ours, SyntheticPedestrians) and ours.num_train_pids == theirs.num_train_pids == 100
        for split in ("query", "gallery"):
            rows = [[(Path(path).name, *rest) for path, *rest in getattr(data, split)] for data in (ours, theirs)]
            assert rows[0] == sorted(rows[1])
        assert sorted({item[1] for item in ours.train}) == list(range(100))
        assert [item[0] for item in ours.train] == sorted(item[0] for item in ours.train)

    def test_raw_pixels_retrieve_other_people_of_the_same_camera(self, root: Path) -> None:
        data = SyntheticPedestrians(str(root), verbose=False)
        rows = [item for item in data.gallery if item[1] != 0][:200]
        pixels = np.stack([np.asarray(Image.open(item[0]).resize((16, 32)), dtype=np.float64).ravel() for item in rows])
        distances = ((pixels[:, None] - pixels[None]) ** 2).sum(2)
        other = np.array([[a[1] != b[1] for b in rows] for a in rows])
        nearest = np.where(other, distances, np.inf).argmin(1)
        shared = np.mean([rows[i][2] == rows[j][2] for i, j in enumerate(nearest)])
        assert shared > 2 / len(CAMERAS)


class TestDrawing:
    def test_the_images_are_always_the_same(self, tmp_path: Path, few: None) -> None:
        for name in "ab":
            SyntheticPedestrians.draw(tmp_path / name)
            random.random()
            np.random.random()
        assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def test_drawing_reads_and_advances_no_global_generator(self) -> None:
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
        rng = np.random.default_rng(0)
        scene = draw_scene(rng, CAMERAS[0])
        draw_image(rng, make_person(rng), CAMERAS[0], scene)
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
        assert before == after

    def test_each_trait_and_camera_changes_the_picture(self) -> None:
        images = []
        for seed, camera in itertools.product(range(3), CAMERAS):
            person = make_person(np.random.default_rng(seed))
            scene = draw_scene(np.random.default_rng(9), camera)
            images.append(np.asarray(draw_image(np.random.default_rng(5), person, camera, scene), dtype=int))
        for one, other in itertools.combinations(images, 2):
            assert np.abs(one - other).mean() > 1.0

    def test_interrupted_drawing_leaves_nothing(
        self, tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = itertools.count()

        def stop(*args: Any) -> Image.Image:
            if next(calls) == 20:
                raise KeyboardInterrupt
            return draw_image(*args)

        monkeypatch.setattr(synthetic, "draw_image", stop)
        with pytest.raises(KeyboardInterrupt):
            SyntheticPedestrians(str(tmp_path), verbose=False)
        assert next(calls) > 20 and list(tmp_path.iterdir()) == []

    def test_processes_that_draw_at_the_same_time_agree(self, tmp_path: Path, few: None) -> None:
        target = tmp_path / "synthetic_pedestrians"
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=SyntheticPedestrians.draw, args=(target,)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert [path.name for path in tmp_path.iterdir()] == ["synthetic_pedestrians"]
        SyntheticPedestrians.draw(tmp_path / "alone")
        assert contents(target) == contents(tmp_path / "alone")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tracklets(tmp_path_factory.mktemp("tracked"))


class TestTracklets:
    def test_splits(self, tracked: Path) -> None:
        data = SyntheticTracklets(str(tracked), transform=1, verbose=False)
        parts = {"train": (6, 36), "query": (6, 18), "gallery": (6, 18)}
        for part, (people, tracklets) in parts.items():
            rows = getattr(data, part)
            assert (len({row[1] for row in rows}), len(rows)) == (people, tracklets)
            for paths, _, camid, _ in rows:
                names = [path.rsplit("/", 1)[1] for path in paths]
                # One person, one camera, one tracklet, frames in order from the first.
                assert {name[:12] for name in names} == {names[0][:12]} and int(names[0][5]) == camid + 1
                assert [int(name[12:15]) for name in names] == list(range(1, len(names) + 1))
                assert 3 <= len(names) <= 6
        assert len({len(row[0]) for row in data.train}) > 1
        assert {row[1] for row in data.query} == {row[1] for row in data.gallery}
        assert not {row[0] for row in data.query} & {row[0] for row in data.gallery}
        for _, pid, camid, _ in data.query:
            assert any(other == pid and at != camid for _, other, at, _ in data.gallery)

    def test_torchreids_own_reader_finds_the_same(self, tracked: Path) -> None:
        ours = SyntheticTracklets(str(tracked), transform=1, verbose=False)
        (tracked / "mars").symlink_to(tracked / "synthetic_tracklets")
        theirs = torchreid.data.datasets.init_video_dataset("mars", root=str(tracked), transform=1, verbose=False)
        for part in ("train", "query", "gallery"):
            rows = [
                [([Path(path).name for path in row[0]], *row[1:]) for row in getattr(data, part)]
                for data in (ours, theirs)
            ]
            assert rows[0] == rows[1]

    def test_all_frames_differ_and_are_always_drawn_alike(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(synthetic, "TRACKED", {"train": range(1, 2), "test": range(2, 3)})
        for name in "ab":
            SyntheticTracklets.draw(tmp_path / name)
        a, b = ([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.jpg"))] for name in "ab")
        assert a == b and len(set(a)) == len(a) > 30


def test_importing_twice_registers_once() -> None:
    torchreid_ext._register(torchreid)
    with pytest.raises(ValueError, match="already exists"):
        torchreid.data.register_image_dataset("synthetic_pedestrians", SyntheticPedestrians)
