"""What all tests share."""

import os

# `pytest -n 2` runs two processes, each of which would start a thread for every core. This must precede `import torch`.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """Slow tests go first, so that no process of `pytest -n` has one left when the others have finished."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
