"""Folders of small pictures, one folder per identity: a bar at an angle of its own, each time a little different."""

import math

import numpy as np
from PIL import Image


def draw(folder, identities, images=6, size=20):
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size] - size / 2
    for identity in range(identities):
        place = folder / f"identity{identity:02}"
        place.mkdir(parents=True)
        angle = math.pi * identity / identities
        for image in range(images):
            turned = angle + rng.normal(0, 0.05)
            ink = np.abs(rows * math.cos(turned) - columns * math.sin(turned) + rng.normal(0, 0.5)) < 2
            noise = rng.integers(0, 40, ink.shape)
            Image.fromarray((np.where(ink, 20, 230) + noise - 20).astype(np.uint8)).save(place / f"{image}.png")
    return folder
