"""What README.md shows is what the code does."""

import re
from pathlib import Path

import pytest
import pytorch_metric_learning.losses
import torch
import yaml

from torchreid_ext import get_default_config
from torchreid_ext.__main__ import _parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_smooth_ap_example_prints_what_it_says(capsys):
    (code,) = (block for block in blocks("python") if "SmoothAPLoss" in block)
    exec(code, {"torch": torch, "pytorch_metric_learning": pytorch_metric_learning})
    assert "0.3158" in capsys.readouterr().out


@pytest.mark.parametrize("code", blocks("python"))
def test_python_compiles(code):
    compile(code, "README.md", "exec")


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_configuration(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    cfg = get_default_config()
    cfg.merge_from_file(path)
    for section, keys in yaml.safe_load(text).items():
        assert set(keys) <= set(cfg[section])


def test_commands_name_files_and_keys_that_exist():
    commands = re.findall(r"drsl-train (.*)", "\n".join(blocks("bash")))
    assert commands
    for command in commands:
        args = _parser().parse_args(command.split())
        cfg = get_default_config()
        cfg.merge_from_file(ROOT / args.config_file)
        cfg.merge_from_list(args.opts)
