"""GitHub's torchreid has its code in ``torchreid`` itself; PyPI's, with which the tests run, in ``torchreid.reid``."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# An engine by its name in torchreid, torchreid's own reader of checkpoints, and a configuration with torchreid's loss.
TESTS = (
    "engine/test_engines.py::test_trains_tests_saves_and_resumes[RandomIdentitySampler-True]",
    "config/test_recipes.py::test_several_sources_and_targets_transforms_and_words[triplet]",
)


@pytest.mark.slow
def test_the_torchreid_of_github_trains_and_resumes_too(tmp_path):
    (installed,) = importlib.util.find_spec("torchreid").submodule_search_locations
    source = Path(installed, "reid")
    if not source.is_dir():
        pytest.skip("torchreid is GitHub's already")
    for path in source.rglob("*.py"):
        target = tmp_path / "torchreid" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text().replace("torchreid.reid", "torchreid"))
    # PyPI's torchreid has no module of this name.
    program = "import sys, pytest, torchreid.models; sys.exit(pytest.main(sys.argv[1:]))"
    tests = [str(Path(__file__).parent / test) for test in TESTS]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program, "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
