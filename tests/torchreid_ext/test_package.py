"""The package itself: a quick import that registers with torchreid, whichever is imported first."""

import os
import subprocess
import sys

import pytest

import pml_drsl
import torchreid_ext

USE = """
assert "torchreid.reid.data" not in sys.modules or torchreid_first
import torchreid
assert torchreid.engine.ImageDRSLEngine.__module__ == "torchreid_ext.engine.engines"
assert issubclass(torchreid.engine.VideoPMLEngine, torchreid.engine.Engine)
assert not hasattr(torchreid.engine, "ImageDRSLEngines") and not hasattr(torchreid_ext, "Searchers")
from torchreid_ext import ImageDRSLEngine, Searcher, build_engine
assert ImageDRSLEngine is torchreid.engine.ImageDRSLEngine
from torchreid_ext.data import synthetic
# Drawing the images takes long.
synthetic.SyntheticPedestrians = lambda **options: options
assert torchreid.data.datasets.init_image_dataset("synthetic_pedestrians", root="here") == {"root": "here"}
"""
FIRST = (
    "torchreid_first = False; import torchreid_ext",
    "torchreid_first = True; import torchreid; import torchreid_ext",
    "torchreid_first = True; import torchreid_ext.data.synthetic",
)


def run(code, *words):
    command = [sys.executable, "-W", "ignore", "-c", f"import sys; {code}", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_torchreid_has_the_engines_and_data_sets_in_every_order_of_imports():
    """One process imports what takes long, and each order is a child of it."""
    children = """import os, torch, torchvision, pytorch_metric_learning.losses
for order in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(order, {"sys": sys})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
"""
    done = run(children, *(first + USE for first in FIRST))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "--list keys"),
        (["--version"], 0, "drsl-train "),
        ([], 2, "give a configuration, such as --config-file configs/demo.yaml"),
        (["-s", "market1501"], 2, 'drsl-train: the package torch is not installed: run pip install -e ".[reid]"'),
        (["--list", "models"], 2, 'drsl-train: the package torch is not installed: run pip install -e ".[reid]"'),
    ],
)
def test_the_command_without_torch(words, status, said):
    """This is how a missing package looks, and what --help does not wait for."""
    done = run("sys.modules['torch'] = None; from torchreid_ext.cli.train import main; sys.exit(main())", *words)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert said in done.stdout + done.stderr


def test_versions():
    assert pml_drsl.__version__ == torchreid_ext.__version__ != "unknown"
    assert not hasattr(pml_drsl, "version")


def test_a_type_checker_refuses_names_that_the_packages_lack(tmp_path):
    api = pytest.importorskip("mypy.api")
    script = tmp_path / "script.py"
    script.write_text("from pml_drsl import DRSLos, DRSLoss\nfrom torchreid_ext import Searcher, Searchers\n")
    packages = [package.__file__ for package in (pml_drsl, torchreid_ext)]
    options = ["--config-file=", "--follow-imports=skip", f"--cache-dir={tmp_path}"]
    said, *_ = api.run([*options, *packages, str(script)])
    assert said.count("has no attribute") == 2, said
