"""Tiny image and video data sets on disk, for torchreid's own data managers, and a manager without images."""

import contextlib
import functools
import io
import itertools
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchreid
from PIL import Image

from torchreid_ext.data import synthetic

IDENTITIES, CAMERAS, SHOTS = 6, 2, 2


@functools.cache
def images():
    """By identity, camera and shot: a file's content. One colour an identity, in noise."""
    rng = np.random.default_rng(0)
    contents = {}
    for pid in range(2 * IDENTITIES):
        colour = rng.integers(0, 256, 3)
        for camid, shot in itertools.product(range(CAMERAS), range(SHOTS)):
            noise = rng.normal(0, 30, (32, 16, 3))
            file = io.BytesIO()
            Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(file, "PNG")
            contents[pid, camid, shot] = file.getvalue()
    return contents


def write_images(folder):
    """Writes all images, named PID_CAMERA_SHOT.png; returns (path, pid, camid) of each."""
    Path(folder).mkdir(exist_ok=True)
    rows = []
    for (pid, camid, shot), content in images().items():
        path = Path(folder, f"{pid}_{camid}_{shot}.png")
        if not path.exists():  # A data manager makes its data set three times.
            path.write_bytes(content)
        rows.append((str(path), pid, camid))
    return rows


def split(rows):
    """The first identities train; of the others, camera 0 is the query and all others the gallery."""
    train = [row for row in rows if row[1] < IDENTITIES]
    test = [row for row in rows if row[1] >= IDENTITIES]
    return train, [row for row in test if row[2] == 0], [row for row in test if row[2] > 0]


class ToyImages(torchreid.data.ImageDataset):
    def __init__(self, root="", **kwargs):
        super().__init__(*split(write_images(root)), **kwargs)


class ToyVideo(torchreid.data.VideoDataset):
    def __init__(self, root="", **kwargs):
        images = write_images(root)
        tracklets = [(tuple(p for p, a, b in images if (a, b) == key), *key) for key in {row[1:]: 0 for row in images}]
        super().__init__(*split(tracklets), **kwargs)


def draw_tracklets(folder):
    """Draws ``synthetic_tracklets`` below a folder, of twelve identities in place of 64; returns the folder."""
    with mock.patch.object(synthetic, "TRACKED", {"train": range(1, 7), "test": range(7, 13)}):
        synthetic.SyntheticTracklets.draw(folder / "synthetic_tracklets")
    return folder


class Manager:
    """As much of a data manager as an engine needs to take single steps on tensors."""

    def __init__(self, num_train_pids=2):
        self.num_train_pids = num_train_pids
        dataset = torchreid.data.ImageDataset.__new__(torchreid.data.ImageDataset)
        dataset.data = [("", 0, 0, 0)] * 4
        self.train_loader = torch.utils.data.DataLoader(dataset, batch_size=4)
        self.test_loader = {}


def _register(register, name, dataset):
    # torchreid has no way to ask, and another test file may have been first.
    with contextlib.suppress(ValueError):
        register(name, dataset)


def register_toys():
    _register(torchreid.data.register_image_dataset, "toy", ToyImages)
    _register(torchreid.data.register_video_dataset, "toy_video", ToyVideo)


def make_image_manager(folder, **kwargs):
    _register(torchreid.data.register_image_dataset, "toy", ToyImages)
    settings = {"batch_size_train": 8, "num_instances": 4, "train_sampler": "RandomIdentitySampler"}
    settings |= {"height": 64, "width": 32, "workers": 0, "use_gpu": False, "transforms": []} | kwargs
    return torchreid.data.ImageDataManager(root=folder / "toy", sources="toy", **settings)


def make_video_manager(folder, **kwargs):
    _register(torchreid.data.register_video_dataset, "toy_video", ToyVideo)
    settings = {"batch_size_train": 4, "num_instances": 2, "train_sampler": "RandomIdentitySampler", "seq_len": 3}
    settings |= {"height": 64, "width": 32, "workers": 0, "use_gpu": False, "transforms": []} | kwargs
    return torchreid.data.VideoDataManager(root=folder / "toy", sources="toy_video", **settings)
