"""README.md and the pages in docs/ show what the code does: their code runs, their commands and links exist.

The Python blocks of a page run in order, in one namespace, as they stand, in a folder that holds ``photos/``,
``street.jpg``, a few images in the places of VIPeR and CUHK03, and the checkpoints of the runs that the pages name: a
network, trained for one epoch on drawn images.
A block that cannot run here has the reason in a comment before it: ``<!-- not run: needs a GPU -->``.
"""

from __future__ import annotations

import argparse
import configparser
import inspect
import pydoc
import re
import shlex
import shutil
import string
import sys
import warnings
from pathlib import Path

import pytest
import toy_data
import trained
import yaml
from PIL import Image

import pml_drsl
import torchreid_ext
from pml_drsl import DRSLoss
from torchreid_ext import get_default_config
from torchreid_ext.benchmark.grid import read_losses

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\s*)?^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```", re.M | re.S
)


def blocks(language, page):
    """The (reason not to run, code) of each block of a page in a language."""
    found = BLOCK.finditer(TEXTS[page])
    return [(block["reason"], block["code"]) for block in found if block["language"] == language]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder that every page starts from."""
    folder = tmp_path_factory.mktemp("prepared")
    trained.train(folder, **{"data.save_dir": folder / "log" / "demo"})
    for name in re.findall(r"log/(\w+)/model/model-best", "".join(TEXTS.values())):
        if name != "demo":
            shutil.copytree(folder / "log" / "demo", folder / "log" / name, dirs_exist_ok=True)
    photos = (
        "photos/anna/hall_1.jpg", "photos/anna/door_1.jpg", "photos/ben/door_1.jpg", "street.jpg",
        "VIPeR_m/0001_1.png", "VIPeR_m/0001_2.png", "DATA/cuhk03/labeled/train/1_0.jpg",
    )  # fmt: skip
    for name, image in zip(photos, sorted((folder / "images").iterdir()), strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(image).save(folder / name)
    return folder


def a_script_of_torchreid(folder):
    """What the guide says that its reader has: a script that makes these."""
    import torchreid

    datamanager = toy_data.make_image_manager(folder)
    model = torchreid.models.build_model("osnet_x0_25", datamanager.num_train_pids, pretrained=False)
    optimizer = torchreid.optim.build_optimizer(model)
    return {"torchreid": torchreid, "datamanager": datamanager, "optimizer": optimizer, "scheduler": None}


@pytest.mark.parametrize("page", [page for page in TEXTS if blocks("python", page)])
def test_python_runs_and_prints_what_it_says(page, prepared, tmp_path, monkeypatch, capsys):
    import torchreid

    folder = shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(folder)
    osnet = sys.modules[torchreid.models.osnet_x1_0.__module__]
    monkeypatch.setattr(osnet, "init_pretrained_weights", lambda *_, **__: None)  # which downloads them
    names = {"__name__": "__main__"} | (a_script_of_torchreid(tmp_path) if page == "docs/torchreid.md" else {})
    expected = []
    for reason, code in blocks("python", page):
        if reason:
            warnings.warn(f"{page}: a block is not run: {reason}", stacklevel=1)
            continue
        exec(compile(code, page, "exec"), names)
        expected += re.findall(r"print\(.*\)  # (\S+)$", code, re.M)  # a comment of one word is the output
    printed = iter(capsys.readouterr().out.split())
    assert all(any(word == value for word in printed) for value in expected), "in this order"


def test_a_block_that_prints_something_else_is_noticed(monkeypatch, prepared, tmp_path, capsys):
    monkeypatch.setitem(TEXTS, "page", "```python\nprint(1 + 1)  # 3\n```\n")
    with pytest.raises(AssertionError):
        test_python_runs_and_prints_what_it_says("page", prepared, tmp_path, monkeypatch, capsys)


PROGRAM = re.compile(r"(?:\S*/)?(drsl-\w+)$|((?:torchreid_ext|pml_drsl)[\w.]*)$")


def commands(page):
    """The words of each command of ours in the bash blocks of a page, with its variables replaced."""
    found, variables = [], {}
    for _, code in blocks("bash", page) + blocks("sh", page):
        for line in code.replace("\\\n", " ").splitlines():
            variables |= dict(re.findall(r"""([A-Z_]+)=["']?([^"'\n]*)""", line))
            line = string.Template(line).safe_substitute(variables)
            for part in re.split(r"&&|\||>", line):
                words = shlex.split(part, comments=True)
                for index, word in enumerate(words):
                    if (name := PROGRAM.match(word)) and (name[1] or words[index - 1] == "-m"):
                        found.append([name[1] or name[2], *words[index + 1 :]])
                        break
    return found


def test_commands_are_found(monkeypatch):
    code = 'A="-x 1"\n.venv/bin/drsl-search $A \\\n  f > g && torchrun -m torchreid_ext.cli.train b | cat  # c\n'
    monkeypatch.setitem(TEXTS, "page", f"```bash\n{code}```\n")
    assert commands("page") == [["drsl-search", "-x", "1", "f"], ["torchreid_ext.cli.train", "b"]]


def main_of(command):
    """The function behind a console script, or behind a module that is run by ``python -m``."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = dict(line.split(" = ") for line in setup["options.entry_points"]["console_scripts"].splitlines() if line)
    scripts["torchreid_ext"] = scripts["drsl-train"]
    return pydoc.locate(scripts[command].replace(":", ".") if command in scripts else f"{command}.main")


class Parsed(Exception):
    """A command line was parsed, and its program must not start."""


@pytest.mark.parametrize("page", [page for page in TEXTS if commands(page)])
def test_commands_have_options_and_keys_that_exist(page, monkeypatch):
    parse, parse_mixed = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_intermixed_args

    def stop(original):
        def parsed(parser, args=None, namespace=None):
            result = original(parser, args, namespace)
            if not hasattr(result, "command"):  # a subcommand has a parser of its own, for the other words
                raise Parsed(result)
            return result

        return parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop(parse))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", stop(parse_mixed))
    for words in commands(page):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(Parsed) as caught:
            main_of(words[0])(words[1:])
        args = caught.value.args[0]
        files, keys, losses = [], [], {}
        if words[0] in ("drsl-train", "torchreid_ext"):
            files, keys = [args.config_file] if args.config_file else [], args.opts
        elif words[:2] == ["drsl-benchmark", "run"]:
            files = [word for word in args.words if word.endswith(".yaml")]
            keys = [word for word in args.words if word not in files]
            keys += [word for varied in args.vary for word in varied[:2]]
            losses, _ = read_losses(ROOT / (args.losses_file or "configs/losses.yaml"), args.losses)
        cfg = get_default_config()
        for file in files:
            if "/" in file:  # not a file of the reader's
                cfg.merge_from_file(ROOT / file)
        cfg.merge_from_list(keys)
        for snippet in losses.values():
            cfg.merge_from_list([word for pair in snippet.items() for word in pair])


def test_commands_stand_in_blocks_that_the_tests_above_read():
    for page, text in TEXTS.items():
        assert not re.findall(r"^(?: {4}|\t)(?:drsl-|torchrun|python -m).*", re.sub(BLOCK, "", text), re.M), page


@pytest.mark.parametrize(
    "page, text",
    [(page, text) for page in TEXTS for _, text in blocks("yaml", page) if "not a configuration" not in text],
)
def test_yaml_is_configuration(page, text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    (tmp_path / "FILE_OF_TORCHREID.yaml").write_text("loss: {name: softmax}\ntest: {dist_metric: euclidean}\n")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    cfg = get_default_config()
    cfg.merge_from_file(path)
    for section, keys in yaml.safe_load(text).items():
        assert section == "base" or set(keys) <= set(cfg[section])


def test_the_strong_baseline_of_the_guide_is_that_of_the_paper(tmp_path):
    """Luo et al., TMM 2019: batches of 16 people with 4 images each; learning rates that fall at epochs 40 and 70."""
    (text,) = (text for _, text in blocks("yaml", "docs/torchreid.md") if "last_stride" in text)
    (tmp_path / "config.yaml").write_text(text.replace("configs/", f"{ROOT}/configs/"))
    cfg = get_default_config()
    cfg.merge_from_file(tmp_path / "config.yaml")
    assert (cfg.train.batch_size, cfg.sampler.num_instances) == (64, 4)
    assert cfg.sampler.train_sampler == "RandomIdentitySampler"
    assert cfg.model.bnneck and cfg.model.last_stride == 1
    assert cfg.loss.triplet.weight_x == cfg.loss.triplet.weight_t == 1
    assert cfg.train.lr_scheduler == "multi_step" and max(cfg.train.stepsize) == 70 < cfg.train.max_epoch == 120


def test_the_names_in_the_text_exist():
    names = {*re.findall(r"`((?:pml_drsl|torchreid_ext)(?:\.\w+)+)[`(]", "".join(TEXTS.values()))}
    assert len(names) >= 5
    assert [name for name in names if pydoc.locate(name) is None] == []


def test_the_reference_has_what_the_packages_export():
    listed = re.findall(r"^ +- (\w+)$", TEXTS["docs/api.md"], re.M)
    assert sorted(listed) == sorted([*pml_drsl.__all__, *torchreid_ext.__all__])


def test_the_reference_names_everything_where_it_is_defined():
    """A strict type checker refuses to import a name from a module that only imports it."""
    for path in re.findall(r"^::: ([\w.]+)$", TEXTS["docs/api.md"], re.M):
        found = pydoc.locate(path)
        assert inspect.ismodule(found) or f"{found.__module__}.{found.__qualname__}" == path


def test_the_table_of_parameters_is_the_signature():
    readme = TEXTS["README.md"]
    table = readme[readme.index("| Parameter | Default |") :].split("\n\n")[0]
    signature = inspect.signature(DRSLoss).parameters.values()
    expected = {value.name: repr(value.default) for value in signature if value.kind is not value.VAR_KEYWORD}
    for name in ("distance", "reducer"):
        default = getattr(DRSLoss(), f"get_default_{name}")()
        expected.setdefault(name, f"{type(default).__name__}()")
    assert dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.M)) == expected


def anchors(text):
    """The names of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings():
    links = [(page, target) for page, text in TEXTS.items() for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    for page, target in links:
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), (page, target)
        assert not heading or heading in anchors(linked.read_text(encoding="utf-8")), (page, target)


def test_the_index_lists_every_page():
    index = TEXTS["docs/index.md"]
    pages = [Path(page).name for page in TEXTS if page.startswith("docs/")]
    assert [page for page in pages if f"({page})" not in index] == ["index.md"]
