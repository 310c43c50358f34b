"""Both distributions of torchreid: PyPI's has its code in ``torchreid.reid``, GitHub's in ``torchreid`` itself."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import layouts
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
@pytest.mark.parametrize(("layout", "half"), [("installed", 0), ("github", 1)])
def test_combinations_train_save_and_resume(tmp_path, layout, half):
    paths = [TESTS.parent, TESTS / "support"]
    if layout == "github":
        paths.insert(0, as_on_github(tmp_path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(TESTS / "support" / "layouts.py"), str(tmp_path / "runs"), str(half)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    modules, *trained = done.stdout.splitlines()
    if layout == "github":
        assert modules == "torchreid.models"
    assert trained == [" ".join(combination) for combination in layouts.combinations(half)]


def test_the_halves_hold_every_pair_and_together_every_combination():
    halves = [set(layouts.combinations(half)) for half in (0, 1)]
    for half in halves:
        for left, right in itertools.combinations(range(3), 2):
            pairs = itertools.product(*((layouts.LOSSES, layouts.SCHEDULERS, layouts.AMPS)[i] for i in (left, right)))
            assert {(combination[left], combination[right]) for combination in half} == set(pairs)
    assert halves[0] | halves[1] == set(itertools.product(layouts.LOSSES, layouts.SCHEDULERS, layouts.AMPS))
