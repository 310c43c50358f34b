"""What all tests share."""

import os

# `pytest -n 2` runs two processes, each of which would start a thread for every core. This must precede `import torch`.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from PIL import Image, PngImagePlugin


def _save_fast(image, file, filename):
    """Saves a PNG with little compression. Tests write thousands, among them a page of images for each test's log."""
    image.encoderinfo.setdefault("compress_level", 1)
    PngImagePlugin._save(image, file, filename)


# No test can see whether a file would outlive a power failure.
os.fsync = lambda handle: None

Image.preinit()
Image.register_save("PNG", _save_fast)


def pytest_collection_modifyitems(items):
    """Slow tests go first, so that no process of `pytest -n` has one left when the others have finished."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
