"""Both distributions of torchreid: PyPI's has its code in ``torchreid.reid``, GitHub's in ``torchreid`` itself."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def as_on_github(folder):
    """Copies the installed package to where GitHub's has its modules; returns what to put on PYTHONPATH."""
    (installed,) = importlib.util.find_spec("torchreid").submodule_search_locations
    source = Path(installed, "reid")
    if not source.is_dir():
        pytest.skip("torchreid is GitHub's already")
    for path in source.rglob("*.py"):
        target = folder / "torchreid" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text().replace("torchreid.reid", "torchreid"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["installed", "github"])
def test_every_combination_trains_saves_and_resumes(tmp_path, layout):
    paths = [TESTS.parent, TESTS / "support"]
    if layout == "github":
        paths.insert(0, as_on_github(tmp_path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(TESTS / "support" / "layouts.py"), str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    modules, *combinations = done.stdout.splitlines()
    if layout == "github":
        assert modules == "torchreid.models"
    wanted = itertools.product(["softmax", "triplet", "drsl", "pml"], ["multi_step", "none"], ["off", "bf16"])
    assert combinations == [" ".join(combination) for combination in wanted]
