"""Imports point one way, and need what is declared."""

from __future__ import annotations

import configparser
import re
import sys
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
# The packages of a distribution are not always called like it. torch brings triton where it can be used.
DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn",
                 "triton": "torch", "yaml": "pyyaml"}  # fmt: skip


def test_imports_point_one_way():
    """The contracts are in ``pyproject.toml``."""
    assert lint_imports(str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True) == 0


@pytest.mark.parametrize("package", ["pml_drsl", "torchreid_ext"])
def test_what_is_imported_is_declared(package: str):
    """Everything that a package imports, also inside functions, is a requirement of it or of one of its extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = [setup["options"]["install_requires"], *(extras[name] for name in extras if name not in ("test", "dev"))]
    lines = "\n".join(lines).splitlines()
    declared = {re.split(r"[<>=!~\[ ;]", line)[0].lower() for line in lines if line and not line.startswith("#")}
    graph = grimp.build_graph("pml_drsl", "torchreid_ext", include_external_packages=True, cache_dir=None)
    own = [module for module in graph.modules if module.split(".")[0] == package]
    imported = {name.split(".")[0] for module in own for name in graph.find_modules_directly_imported_by(module)}
    imported -= {"pml_drsl", "torchreid_ext", *sys.stdlib_module_names}
    assert "torch" in imported
    assert {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in imported} <= declared
