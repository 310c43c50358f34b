"""What all tests share."""

import os

# `pytest -n 2` runs two processes, each of which would start a thread for every core. This must precede `import torch`.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
