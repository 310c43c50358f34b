"""The two packages keep their shape: small files, small functions, and imports that point one way."""

from __future__ import annotations

import ast
import configparser
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pml_drsl", "torchreid_ext")
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60

# A folder of torchreid_ext may import from the folders of a lower floor, and from other folders of its own floor.
FLOORS = (
    {"pml_drsl"},
    {"torchreid_ext.runtime"},
    {
        "torchreid_ext.data",
        "torchreid_ext.evaluation",
        "torchreid_ext.checkpoint",
        "torchreid_ext.networks",
        "torchreid_ext.images",
        "torchreid_ext.pixels",
    },
    {"torchreid_ext.engine"},
    {"torchreid_ext.config"},
    {"torchreid_ext.search"},
    {"torchreid_ext.cli"},
    {"torchreid_ext", "torchreid_ext.__main__"},
)

# The name of a distribution where it differs from the name of the module.
# torch brings triton where it can use it, and ``pml_drsl.kernels`` is imported only there.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "triton": "torch", "yaml": "pyyaml"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(nodes: ast.AST, deep: bool) -> Iterator[str]:
    """Yields every imported name in full; with ``deep`` also the imports inside functions."""
    for node in ast.iter_child_nodes(nodes):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif deep or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, deep)


def own_imports(name: str, deep: bool = True) -> set[str]:
    """Returns the modules of the two packages that a module imports."""
    found = set()
    for full in imports(TREES[name], deep):
        module = full if full in FILES else full.rpartition(".")[0]
        if full.split(".")[0] in PACKAGES:
            assert module in FILES, f"{name} imports {full}, which is not a file"
            found.add(module)
    return found - {name}


def folder(module: str) -> str:
    parent = module.rpartition(".")[0]
    return module if FILES[module].name == "__init__.py" or parent == "torchreid_ext" else parent


def floor(module: str) -> int:
    """Returns the number of a module's floor, 0 for the lowest."""
    part = ".".join(module.split(".")[:2]) if module.startswith("torchreid_ext") else "pml_drsl"
    (number,) = (number for number, folders in enumerate(FLOORS) if part in folders)
    return number


def without_circles(graph: dict[str, set[str]]) -> None:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_no_circle_between_files():
    without_circles({name: own_imports(name) for name in FILES})


def test_no_circle_between_folders():
    graph: dict[str, set[str]] = {}
    for name in FILES:
        graph.setdefault(folder(name), set()).update(folder(other) for other in own_imports(name))
    for name, others in graph.items():
        others.discard(name)
    without_circles(graph)


def test_no_folder_imports_from_a_higher_floor():
    assert len(FILES) > 50
    upward = [
        f"{name} -> {other}"
        for name in FILES
        if name.startswith("torchreid_ext")
        for other in own_imports(name)
        if floor(other) > floor(name)
    ]
    assert not upward


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("pml_drsl")])
def test_the_loss_package_stands_alone(name: str):
    """Only functions may import torchreid and its companions: the import of the package needs none of them."""
    forbidden = {"torchreid_ext", "torchreid", "cv2", "yacs"}
    assert forbidden.isdisjoint(full.split(".")[0] for full in imports(TREES[name], deep=False))


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    """Counts a function's lines without its docstring, its comment lines and its empty lines."""
    skipped: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
            skipped |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    numbers = range(function.lineno, (function.end_lineno or 0) + 1)
    code = [number for number in numbers if number not in skipped and source[number - 1].strip()]
    return sum(not source[number - 1].lstrip().startswith("#") for number in code)


def test_lines_of_code_leaves_out_docstrings_and_comments():
    text = 'def f():\n    """Doc.\n\n    More.\n    """\n    # Why.\n\n    x = 1\n    return x\n'
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert lines_of_code(function, text.splitlines()) == 3


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_small(name: str):
    source = FILES[name].read_text(encoding="utf-8").splitlines()
    length = len(source)
    assert length <= MAX_FILE_LINES, f"{FILES[name]} has {length} lines"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = lines_of_code(node, source)
            assert length <= MAX_FUNCTION_LINES, f"{name}.{node.name} has {length} lines of code"


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_of_a_module_begins_with_one_sentence(name: str):
    docstring = ast.get_docstring(TREES[name])
    assert docstring, f"{FILES[name]} has no docstring"
    summary = docstring.split("\n\n")[0]
    assert summary.endswith("."), f"{FILES[name]}: the docstring must begin with a sentence: {summary!r}"
    # A dot and a capital letter begin a second sentence; abbreviations and file names do not look like that.
    assert not re.search(r"[a-z)`][.:;] [A-Z]", " ".join(summary.split())), f"{FILES[name]}: {summary!r}"


def requirements(*extras: str) -> set[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += setup["options.extras_require"][extra].splitlines()
    return {re.split(r"[<>=!~ ;]", line)[0] for line in lines if line and not line.startswith("#")}


@pytest.mark.parametrize("name", FILES)
def test_what_a_module_imports_is_declared(name: str):
    """Imports at the top of a module need the base installation or the extra of its folder."""
    extras = ["reid"] if name.startswith("torchreid_ext") else ["benchmark"] if ".benchmark" in name else []
    for full in imports(TREES[name], deep=False):
        top = full.split(".")[0]
        if top not in sys.stdlib_module_names and top not in PACKAGES:
            assert DISTRIBUTIONS.get(top, top.replace("_", "-")) in requirements(*extras), f"{name} imports {top}"
