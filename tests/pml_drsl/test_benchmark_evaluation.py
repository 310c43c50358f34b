"""``drsl-benchmark evaluation`` at a small size: what it prints and writes; its numbers are for a quiet machine."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path

import pytest

from pml_drsl.benchmark.evaluation import add_arguments, run

SIZE = {"queries": 30, "gallery": 200, "dim": 16, "identities": 10, "cameras": 3, "threads": 1, "rounds": 1}


def benchmark(*arguments: str) -> int:
    parser = ArgumentParser()
    add_arguments(parser)
    small = [f"--{name}={value}" for name, value in SIZE.items()]
    return run(parser.parse_args([*small, *arguments]))


def test_compares_with_torchreid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchreid")
    assert benchmark("--json", str(tmp_path / "b.json")) == 0
    report = json.loads((tmp_path / "b.json").read_text())
    ours, host = report["measurements"]
    assert (ours["implementation"], host["implementation"]) == ("pml_drsl", "torchreid")
    assert ours["mAP"] == pytest.approx(host["mAP"], abs=1e-6) and 0.1 < ours["mAP"] < 1
    assert ours["rank_1"] == pytest.approx(host["rank_1"], abs=1e-6)
    assert ours["seconds"] > 0 and ours["peak_bytes"] >= 0
    assert f"{report['ratio']:.1f} times as fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--no-host", "--rerank"], "as asked"), (["--memory", "0"], "over --memory 0")],
)
def test_says_why_torchreid_is_left_out(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--memory" in options:
        pytest.importorskip("torchreid")
    assert benchmark(*options) == 0
    assert reason in capsys.readouterr().out


def test_refuses_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark("--queries", "0") == 2
    assert "--queries 0" in capsys.readouterr().err
