"""drsl-evaluate of runs: why one fails, and one table of several; feature files alone need no torchreid."""

import csv
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import trained

from torchreid_ext.cli import evaluate, extract
from torchreid_ext.evaluation import errors

ROOT = Path(__file__).parents[3]
complaint = partial(trained.complaint, command="drsl-evaluate")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained.train(tmp_path_factory.mktemp("run with spaces")).parents[1]


def test_the_errors_of_a_run_and_of_its_features_are_those_of_its_own_test(run, tmp_path, capsys):
    scores = json.loads((run / "metrics.json").read_text())["listed"]
    assert evaluate.main([str(run), "--errors"]) == 0
    caption = capsys.readouterr().out
    means = f"mAP {scores['mAP']:.1%}, mINP {scores['mINP']:.1%}, rank-1 {scores['cmc'][0]:.1%}"
    assert caption.startswith(f"By cosine distance: {means}")
    page = (run / "errors.html").read_text(encoding="utf-8")
    assert page.count("<section") == min(50, scores["num_query"]) and "cosine distance" in page
    assert "the picture cannot be read" not in page
    assert extract.main([str(run), "--output", str(tmp_path / "f.npz")]) == 0
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "f.npz"), "--errors"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == caption.splitlines()[0]
    assert (tmp_path / "errors.html").read_text(encoding="utf-8").replace(str(tmp_path / "f.npz"), str(run)) == page
    checkpoint = run / "model" / "model-best.pth.tar"
    assert evaluate.main([str(checkpoint), "--errors", "--html", str(tmp_path / "c.html")]) == 0


def test_the_processes_that_read_the_images_of_a_run_do_not_import_torch_each(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("multiprocessing.set_forkserver_preload", asked.extend)
    monkeypatch.setattr(errors, "_drawn", lambda *given: "")  # Figures take seconds.
    assert evaluate.main([str(run), "--errors", "--html", str(tmp_path / "p.html")]) == 0
    assert asked == ["torchreid_ext.search.features"]


def test_damaged_images_are_left_out_and_gone_ones_are_named(tmp_path, capsys):
    run = trained.train(tmp_path).parents[1]
    query = next(line.split(",")[0] for line in (tmp_path / "list.csv").read_text().splitlines() if "query" in line)
    (tmp_path / query).write_bytes(b"")
    capsys.readouterr()
    assert evaluate.main([str(run), "--errors"]) == 0
    queries = json.loads((run / "metrics.json").read_text())["listed"]["num_query"]
    out, err = capsys.readouterr()
    assert err.startswith("left out: cannot read image") and f"hardest of {queries - 1} queries" in out
    (tmp_path / query).unlink()
    assert evaluate.main([str(run), "--errors", "--html", str(tmp_path / "p.html")]) == 2
    assert query in complaint(capsys) and not (tmp_path / "p.html").exists()


def test_weights_without_a_run_are_refused_with_advice_that_this_command_takes(tmp_path, capsys):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "zoo.pth")
    assert evaluate.main([str(tmp_path / "zoo.pth"), "--errors"]) == 2
    said = complaint(capsys)
    assert "holds no configuration" in said and "drsl-extract" in said and "--" not in said


def test_features_of_another_program_have_no_images(tmp_path, capsys):
    ids = np.arange(3) // 2
    arrays = {"query": np.eye(3), "gallery": np.eye(3), "query_ids": ids, "gallery_ids": ids, "query_paths": ids[:1]}
    np.savez(tmp_path / "f.npz", **arrays)
    assert evaluate.main([str(tmp_path / "f.npz"), "--errors"]) == 0
    assert "6 of the 6 images cannot be found" in capsys.readouterr().out
    assert ">query 2 - first match at rank 1, AP 100.0%<" in (tmp_path / "errors.html").read_text(encoding="utf-8")
    np.savez(tmp_path / "f.npz", **arrays | {"query": np.float64(1)})
    assert evaluate.main([str(tmp_path / "f.npz"), "--errors"]) == 2
    assert "query features have shape []" in complaint(capsys)


def made_run(folder, sources, **scores):
    folder.mkdir()
    metrics = {target: {"mAP": mAP, "mINP": 0.1, "cmc": [rank1, 1.0]} for target, (mAP, rank1) in scores.items()}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.yaml").write_text(f"data: {{sources: [{sources}]}}\n")
    return str(folder)


def test_several_runs_are_one_table(tmp_path, capsys):
    runs = [
        made_run(tmp_path / "1", "a", b=(0.25, 0.5), c=(0.125, 1.0)),
        made_run(tmp_path / "2", "a, b", c=(0.75, 0.8)),
        made_run(tmp_path / "3", "a", b=(0.3, 0.6)),
    ]
    assert evaluate.main([*runs, "--csv", str(tmp_path / "t.csv")]) == 0
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["sources", "b mAP", "b rank-1", "c mAP", "c rank-1"],
        [f"a ({runs[0]})", "25.0", "50.0", "12.5", "100.0"],
        ["a+b", "-", "-", "75.0", "80.0"],
        [f"a ({runs[2]})", "30.0", "60.0", "-", "-"],
    ]
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == lines
    # A name with a byte that is not UTF-8.
    odd = made_run(tmp_path / os.fsdecode(b"\xff"), "a", b=(0.5, 0.5))
    assert evaluate.main([runs[0], odd, "--csv", str(tmp_path / "t.csv")]) == 0
    assert f"a ({odd})" in os.fsdecode((tmp_path / "t.csv").read_bytes())


def test_the_table_has_what_a_run_wrote(run, capsys):
    scores = json.loads((run / "metrics.json").read_text())["listed"]
    assert evaluate.main([str(run)]) == 0
    values = [f"{100 * scores['mAP']:.1f}", f"{100 * scores['cmc'][0]:.1f}"]
    assert capsys.readouterr().out.splitlines()[1].split() == ["listed", *values]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--errors", "--rerank"], "--rerank does not go with --errors"),
        (["RUN", "--errors", "--metric", "cosine"], "--metric does not go with --errors"),
        (["RUN", "--errors", "--root", "nowhere"], "nowhere/list.csv: set data.root (--root)"),
        (["f.npz", "--root", "nowhere"], "--root does not go with feature files"),
        (["RUN", "RUN", "--errors"], "takes one run, got 2"),
        (["RUN", "--html", "p.html"], "--html does not go with runs without --errors"),
        (["f.npz", "--csv", "t.csv"], "--csv does not go with feature files"),
        (["RUN", "--csv", "RUN/metrics.json"], "would overwrite the input"),
        (["RUN", "--csv", "photo.jpg"], "photo.jpg', which has the name of an image"),
        (["RUN", "--errors", "--html", "RUN/model/model-best.pth.tar"], "would overwrite the input"),
        (["RUN", "--errors", "--html", "RUN/../images/00.png"], "has the name of an image"),
        (["RUN", "--errors", "--html", "nowhere/p.html"], "there is no folder 'nowhere'"),
        (["f.npz", "--errors", "--device", "cpu"], "--device does not go with --errors"),
        (["RUN/model"], "has no metrics.json"),
        (["RUN/model/model-best.pth.tar"], "drsl-extract CHECKPOINT --output features.npz, or a run: drsl-"),
        (["RUN", "f.npz"], "'f.npz' has no metrics.json"),
        (["nowhere", "--errors"], "'nowhere' does not exist: give a file of features, or the folder of a run"),
        (["nowhere.npz"], "'nowhere.npz' does not exist"),
        (["f.npz", "--json", "photo.jpg"], "photo.jpg', which has the name of an image"),
    ],
)
def test_bad_input(run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    np.savez("f.npz", query=np.eye(2))
    image = next(path for path in sorted((run.parent / "images").rglob("*")) if path.is_file())
    words = [str(image) if "images" in word else word.replace("RUN", str(run)) for word in words]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert evaluate.main(words) == 2
    assert message in complaint(capsys)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


@pytest.mark.parametrize(("name", "text"), [("metrics.json", "[1]"), ("metrics.json", "{"), ("config.yaml", "a: [")])
def test_a_damaged_run_is_named(tmp_path, capsys, name, text):
    run = made_run(tmp_path / "1", "a", b=(0.25, 0.5))
    (tmp_path / "1" / name).write_text(text)
    assert evaluate.main([run]) == 2
    assert "damaged" in complaint(capsys)


def test_feature_files_need_no_torchreid(tmp_path):
    ids = np.arange(3)
    np.savez(tmp_path / "f.npz", query=np.eye(3), gallery=np.eye(3), query_ids=ids, gallery_ids=ids)
    blocked = ["torchreid", "torchvision", "PIL", "yaml", "yacs", "cv2", "faiss", "matplotlib"]
    code = f"""
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Missing)
from torchreid_ext.cli.evaluate import main
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "f.npz")], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and re.search(r"mAP +100.00%", done.stdout), done.stderr
