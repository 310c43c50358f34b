"""README.md and the pages in docs/ show what the code does."""

import inspect
import re
from pathlib import Path

import pytest
import yaml

from pml_drsl import DRSLoss
from torchreid_ext import get_default_config
from torchreid_ext.cli.train import _parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language, *pages):
    texts = [(ROOT / page).read_text() for page in pages or ["README.md"]]
    return [block for text in texts for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


@pytest.mark.parametrize("page", ["README.md", "docs/loss.md"])
def test_python_runs_and_prints_what_it_says(page, capsys):
    names = {}
    code = "\n".join(blocks("python", page))
    exec(code, names)
    assert capsys.readouterr().out.split() == re.findall(r"print\(.*\)  # (\S+)", code)
    assert code


def test_the_first_example_is_short():
    (example,) = blocks("python")
    assert sum(bool(line) for line in example.splitlines()) <= 8


def test_the_readme_is_short():
    assert len(README.split()) < 1000


def parameters():
    table = README[README.index("| Parameter | Default |") :].split("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.M))


def test_the_table_of_parameters_is_the_signature():
    signature = inspect.signature(DRSLoss).parameters.values()
    expected = {value.name: repr(value.default) for value in signature if value.kind is not value.VAR_KEYWORD}
    for name in ("distance", "reducer"):
        default = getattr(DRSLoss(), f"get_default_{name}")()
        expected.setdefault(name, f"{type(default).__name__}()")
    assert parameters() == expected


@pytest.mark.parametrize("text", blocks("yaml", "README.md", "docs/data.md"))
def test_yaml_is_configuration(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    cfg = get_default_config()
    cfg.merge_from_file(path)
    for section, keys in yaml.safe_load(text).items():
        assert set(keys) <= set(cfg[section])


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_commands_name_files_and_keys_that_exist(page):
    commands = re.findall(r"drsl-train (.*)", "\n".join(blocks("bash", page)))
    assert commands
    for command in commands:
        args = _parser().parse_args(command.split())
        cfg = get_default_config()
        cfg.merge_from_file(ROOT / args.config_file)
        cfg.merge_from_list(args.opts)


def anchors(page):
    """The names of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not heading or heading in anchors(linked), target


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name})" not in index] == ["index.md"]
