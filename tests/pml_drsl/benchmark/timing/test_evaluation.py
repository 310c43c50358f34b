"""``drsl-benchmark evaluation`` at a small size: what it prints and writes; its numbers are for a quiet machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from pml_drsl.benchmark.__main__ import main
from pml_drsl.benchmark.timing.evaluation import Task, make_search
from pml_drsl.benchmark.timing.search import FoundDistances
from pml_drsl.evaluation.scores import evaluate

SIZE = {"queries": 30, "gallery": 200, "dim": 16, "identities": 10, "cameras": 3, "threads": 1, "rounds": 1}


def benchmark(*arguments: str) -> int:
    return main(["evaluation", *(f"--{name}={value}" for name, value in SIZE.items()), *arguments])


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
    [(["--no-host", "--rerank"], "--no-host is given"), (["--memory", "0"], "over --memory 0")],
)
def test_says_why_torchreid_is_left_out(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--memory" in options:
        pytest.importorskip("torchreid")
    assert benchmark(*options) == 0
    assert reason in capsys.readouterr().out


def test_refuses_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark("--queries", "0") == 2
    assert "--queries 0" in capsys.readouterr().err


def test_an_index_that_reads_all_finds_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    assert benchmark("--index", "ivf", "hnsw", "--top", "20", "--json", str(tmp_path / "b.json")) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["measurements"]
    # Of 200 images five lists can be trained: fewer than the fewest that are read, so that all are.
    assert [(row["index"], row["setting"]) for row in rows] == [("exact", 0), ("ivf", 5), ("hnsw", 64), ("hnsw", 256)]
    exact, ivf = rows[:2]
    assert exact["recall"] == ivf["recall"] == 1
    assert exact["mAP"] == pytest.approx(ivf["mAP"])
    assert all(row["seconds"] > 0 and row["index_bytes"] >= 200 * 16 * 4 for row in rows)
    assert "/ exact" in capsys.readouterr().out


def test_an_exact_search_for_all_has_the_scores_of_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    both = {}
    for name, options in (("found", ["--index", "ivf", "--top", "999"]), ("all", ["--no-host"])):
        assert benchmark(*options, "--json", str(tmp_path / name)) == 0
        both[name] = json.loads((tmp_path / name).read_text())["measurements"][0]
    assert both["found"]["mAP"] == pytest.approx(both["all"]["mAP"], abs=1e-6)
    assert both["found"]["rank_1"] == both["all"]["rank_1"]


def test_what_is_not_found_ranks_last() -> None:
    found = FoundDistances(torch.tensor([[2, -1], [0, 3]]), torch.tensor([[0.5, 9.0], [1.0, 2.0]]), 4)
    last = torch.finfo(torch.float32).max
    wanted = [[last, last, 0.5, last], [1.0, last, last, 2.0]]
    assert found.rows(0, 2).tolist() == torch.tensor(wanted).tolist()
    assert found.rows(1, 2).tolist() == torch.tensor(wanted[1:]).tolist()


def test_a_larger_separation_is_an_easier_search() -> None:
    sizes = {name: value for name, value in SIZE.items() if name != "rounds"}
    hard, easy = (make_search(Task(**sizes, rerank=False, separation=separation)) for separation in (1, 10))
    assert evaluate(**hard).mAP < 0.9 < evaluate(**easy).mAP


def test_a_missing_faiss_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert main(["evaluation", "--index", "ivf", "--queries", "3", "--gallery", "9", "--identities", "2"]) == 2
    assert "needs faiss: pip install 'pml-drsl[benchmark]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--index", "ivf", "--rerank"], "--rerank needs all distances"),
        (["--top", "0"], "--top 0: give at least 1"),
        (["--separation", "-1"], "--separation -1.0: give more than 0"),
    ],
)
def test_refuses_what_it_cannot_do(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(*options) == 2
    assert message in capsys.readouterr().err
