"""The runs of a grid as processes: a script in their place that ends, fails or waits, and once ``drsl-train``."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from toy_data import write_images

from pml_drsl.checks import InputError
from torchreid_ext.benchmark import grid, report, runner
from torchreid_ext.cli import benchmark
from torchreid_ext.config.node import flat, get_default_config

DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"
SCRIPT = """
import json, os, sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert words["model.resume"] == "auto"
folder = Path(words["data.save_dir"])
if words["train.seed"] == "1":
    sys.exit("first line\\ndrsl-train: seed 1 does not work")
if words["train.seed"] == "2":
    (folder.parent / f"waiting {os.getpid()}").touch()
    time.sleep(60)
(folder / "metrics.json").write_text(json.dumps({"people": {"mAP": 0.5, "mINP": 0.25, "cmc": [0.4, 0.6]}}))
(folder / "queries_people.csv").write_text("identity,camera,AP,INP,rank-1\\n3,0,0.123456789,0.1,1\\n4,1,nan,nan,nan\\n")
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    monkeypatch.setattr(runner, "DRSL_TRAIN", (sys.executable, str(path)))


DRSL = {"drsl": {"loss": {"name": "drsl"}}}


def planned(seeds, name="drsl"):
    return grid.plan([DEMO], {name: DRSL["drsl"]}, seeds, ["train.max_epoch", "1"])


def test_a_result_is_a_line_and_is_not_made_again(script, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    assert runner.run_all(planned([0, 3]), results, 2) == 0
    lines = grid.read_results(results)
    assert sorted(line["seed"] for line in lines) == [0, 3]
    line = next(line for line in lines if line["seed"] == 0)
    scores = {"mAP": 0.5, "mINP": 0.25, "rank-1": 0.4}
    assert line["results"]["people"] == scores | {"identity": [3, 4], "AP": [0.12346, None], "hit": [1, None]}
    assert line["configuration"]["train.max_epoch"] == 1 and line["changes"] == {"train.max_epoch": "1"}
    assert runner.run_all(planned([0, 3]), results, 2) == 0
    assert "2 of 2 runs are in" in capsys.readouterr().err
    assert len(grid.read_results(results)) == 2


def test_a_result_is_added_under_every_label_of_its_configuration(script, tmp_path, monkeypatch):
    """As the weight 0.3, which is the default, that drsl-benchmark tune chose, or a varied key at its default."""
    results, tuned = tmp_path / "results.jsonl", {"drsl-tuned": {"loss.name": "drsl", "loss.drsl.weight_m": 0.3}}
    assert runner.run_all(planned([0]), results, 1) == 0
    monkeypatch.setattr(runner, "Process", None)  # A run would raise a TypeError.
    for words, varied, losses in (
        ([], [], tuned),
        ([], [["data.split_id", "0"]], DRSL),
        (["loss.drsl.weight_m", "0.3"], [], DRSL),
        (["loss.drsl.weight_m", "3e-1", "data.workers", "2"], [], DRSL),  # the same once more
    ):
        for _ in range(2):
            runs = grid.plan([DEMO], losses, [0], ["train.max_epoch", "1", *words], varied)
            assert runner.run_all(runs, results, 1) == 0
    first, *copies = grid.read_results(results)
    assert [(line["loss"], *line["varied"], *line["changes"]) for line in copies] == [
        ("drsl-tuned", "train.max_epoch"),
        ("drsl", "data.split_id", "train.max_epoch"),
        ("drsl", "train.max_epoch", "loss.drsl.weight_m"),
    ]
    assert all(line["results"] == first["results"] and line["commit"] == first["commit"] for line in copies)
    text = report.report(report.sections([first, copies[0]]))
    assert "| **drsl** " in text and "| **drsl-tuned** " in text


def test_a_file_that_is_changed_back_is_reported_as_it_is(script, tmp_path):
    own, results = tmp_path / "own.yaml", tmp_path / "results.jsonl"
    for rate in (0.1, 0.2, 0.1, 0.1):
        own.write_text(yaml.safe_dump({"base": str(DEMO), "train": {"lr": rate}}))
        assert runner.run_all(grid.plan([own], DRSL, [0, 3]), results, 2) == 0
    lines = grid.read_results(results)
    assert [line["configuration"]["train.lr"] for line in lines] == [0.1, 0.1, 0.2, 0.2, 0.1, 0.1]
    (section,) = report.sections(lines)
    assert {line["configuration"]["train.lr"] for line in section.lines["drsl"].values()} == {0.1}


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_that_of_the_repository_that_holds_the_package(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "another project, around a virtual environment")
    path = tmp_path / "grid.py"
    path.touch()
    monkeypatch.setattr(grid, "__file__", str(path))
    assert grid.commit() == metadata.version("pml-drsl")
    git("add", "grid.py")
    git("tag", "-a", "v1", "-m", "a release")
    assert grid.commit() == git("rev-parse", "--short=12", "HEAD") + "-dirty"


def test_a_run_that_fails_is_told_in_a_line_and_stops_no_other(script, tmp_path, capsys):
    results, kept = tmp_path / "results.jsonl", tmp_path / "kept"
    assert runner.run_all(planned([1, 0]), results, 1, kept) == 1
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert "demo.yaml, drsl, seed 1 failed: seed 1 does not work" in told
    assert [line["seed"] for line in grid.read_results(results)] == [0]
    # Repeated, it goes on in the folder that was kept.
    assert runner.run_all(planned([1, 0]), results, 1, kept) == 1
    assert len(list(kept.glob("demo-drsl-*/run.yaml"))) == 2


@pytest.mark.parametrize(("name", "error"), [("results.jsonl.gz", InputError), ("file/results.jsonl", OSError)])
def test_a_file_that_takes_no_results_is_refused_before_the_first_run(tmp_path, monkeypatch, name, error):
    monkeypatch.setattr(runner, "Process", None)  # A run would raise a TypeError.
    (tmp_path / "results.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "file").touch()
    with pytest.raises(error):
        runner.run_all(planned([0]), tmp_path / name, 1)


@pytest.mark.parametrize("key", ["data.root", "model.load_weights"])
def test_other_data_or_weights_are_another_run_and_go_to_another_file(script, tmp_path, key):
    """The weights are files of one name, in two folders."""
    one, other = (grid.plan([DEMO], DRSL, [0], [key, f"{folder}/model-best.pth.tar"]) for folder in ("hall", "door"))
    results, kept = tmp_path / "results.jsonl", tmp_path / "kept"
    assert runner.run_all(one, results, 1, kept) == 0
    with pytest.raises(InputError, match=f"{key} 'hall/model-best.pth.tar'.* 'door/model-best.pth.tar'.*--results"):
        runner.run_all(other, results, 1, kept)
    assert runner.run_all(other, tmp_path / "other.jsonl", 1, kept) == 0
    assert runner.run_all(one, results, 1, kept) == 0
    assert len(grid.read_results(results)) == 1 and len([*kept.iterdir()]) == 2


def test_a_run_that_goes_on_with_other_code_names_both_commits(script, tmp_path, monkeypatch):
    """A start that left no checkpoint has no part in its scores."""
    results, kept, starts = tmp_path / "results.jsonl", tmp_path / "kept", iter("abcc")
    monkeypatch.setattr(runner, "commit", lambda: next(starts))
    for _ in range(2):
        assert runner.run_all(planned([1], "drsl*0.3"), results, 1, kept) == 1
    (folder,) = kept.iterdir()
    assert folder.name.startswith("demo-drsl_0.3-")  # a name that Windows allows
    (folder / "model").mkdir()
    (folder / "model" / "model-last.pth.tar").touch()
    (tmp_path / "train.py").write_text(SCRIPT.replace("sys.exit", "print"))
    assert runner.run_all(planned([1, 0], "drsl*0.3"), results, 1, kept) == 0
    assert {line["seed"]: line["commit"] for line in grid.read_results(results)} == {0: "c", 1: "b+c"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals that end a process")
def test_a_run_that_is_killed_is_told_by_its_signal_and_not_by_its_last_warning(script, tmp_path, capsys):
    code = "import os, warnings\nwarnings.warn('a memory that is never used')\nos.kill(os.getpid(), 9)"
    (tmp_path / "train.py").write_text(code)
    assert runner.run_all(planned([0]), tmp_path / "results.jsonl", 1, tmp_path / "kept") == 1
    assert "seed 0 failed: signal 9 ended it; the system does this where memory is full" in capsys.readouterr().err


def test_a_run_is_made_as_planned_though_its_file_was_edited_while_it_waited(script, tmp_path):
    """Its result would tell the old values, and stand beside those of the other losses."""
    own, losses = tmp_path / "own.yaml", {"own": {"loss": {"name": "pml", "pml": {"kwargs": {"margin": 0.1}}}}}
    own.write_text(yaml.safe_dump({"base": str(DEMO), "datasets": {"mine": {"folder": "a"}}, "train": {"lr": 0.01}}))
    (run,) = grid.plan([own], losses, [0], ["data.transforms", "[]"])
    own.write_text(yaml.safe_dump({"base": str(DEMO), "train": {"lr": 0.1}}))
    assert runner.run_all([run], tmp_path / "results.jsonl", 1, tmp_path / "kept") == 0
    (file,) = tmp_path.glob("kept/*/run.yaml")
    made = get_default_config()
    made.merge_from_file(file)
    assert flat(made) == run.configuration and made.train.lr == 0.01


class Ended:
    """In place of a process: a run that ended at once."""

    returncode = 0

    def __init__(self, run, folder):
        (folder / "metrics.json").touch()

    def poll(self):
        return self.returncode

    def result(self):
        return {"configuration": {}, "results": {}}


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_the_folder_of_a_run_whose_result_cannot_be_added_is_kept(tmp_path, monkeypatch, capsys, error):
    def append_result(path, result):
        if error:
            raise error

    monkeypatch.setattr(runner, "Process", Ended)
    monkeypatch.setattr(runner, "append_result", append_result)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(type(error)) if error else nullcontext():
        runner.run_all(planned([0]), tmp_path / "results.jsonl", 1)
    kept = [str(path.parent) for path in tmp_path.glob("*/metrics.json")]
    assert len(kept) == isinstance(error, OSError)
    assert all(f"the runs that ended are kept in {folder}\n" in capsys.readouterr().err for folder in kept)


@pytest.mark.slow
def test_a_signal_stops_the_runs_and_keeps_what_is_done(script, tmp_path):
    """Also while a run starts, which takes the benchmark a second here after the run's process has begun."""
    code = f"""
import subprocess, sys, time
class Slow(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        time.sleep(1)
subprocess.Popen = Slow
sys.path[:0] = {sys.path!r}
from pathlib import Path
from torchreid_ext.benchmark import grid, runner
runner.DRSL_TRAIN, runner.commit = {runner.DRSL_TRAIN!r}, str
runs = grid.plan([Path({str(DEMO)!r})], {{"drsl": {{"loss": {{"name": "drsl"}}}}}}, [0, 2, 3])
runner.run_all(runs, Path("results.jsonl"), 1, Path("kept"))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (waiting := list((tmp_path / "kept").glob("waiting *"))):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) != 0
    assert [line["seed"] for line in grid.read_results(tmp_path / "results.jsonl")] == [0]
    with pytest.raises(ProcessLookupError):
        os.kill(int(waiting[0].name.split()[1]), 0)


def test_drsl_train_itself_through_the_command(tmp_path):
    write_images(tmp_path / "images")
    options = {"folder": "images", "pattern": r"(?P<identity>\d+)_(?P<camera>\d)_\d\.png", "query_cameras": ["0"]}
    values = {
        "datasets": {"toy": options},
        "model": {"name": "osnet_x0_25", "pretrained": False},
        "data": {"sources": ["toy"], "targets": ["toy"], "height": 64, "width": 32},
        "sampler": {"train_sampler": "RandomIdentitySampler"},
        "train": {"batch_size": 8, "max_epoch": 1},
        "use_gpu": False,
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "losses.yaml").write_text(yaml.safe_dump(DRSL))
    words = ["run", str(tmp_path / "toy.yaml"), "--seeds", "1", "--root", str(tmp_path), "data.height", "48"]
    words += ["--keep", str(tmp_path / "kept"), "--results", str(tmp_path / "results.jsonl")]
    assert benchmark.main(words) == 0
    (line,) = grid.read_results(tmp_path / "results.jsonl")
    (folder,) = (tmp_path / "kept").glob("toy-drsl-*")
    metrics = json.loads((folder / "metrics.json").read_text())["toy"]
    result = line["results"]["toy"]
    # The scores of the queries are those whose means drsl-train prints.
    assert sum(result["AP"]) / len(result["AP"]) == pytest.approx(metrics["mAP"], abs=1e-4)
    assert sum(result["hit"]) / len(result["hit"]) == pytest.approx(metrics["cmc"][0])
    assert len(result["identity"]) == metrics["num_query"] and line["configuration"]["data.height"] == 48


def test_tuning_tells_the_trials_of_a_loss_from_those_of_another_with_a_longer_name(monkeypatch):
    scores = {"drsl*1": 0.5, "drsl*1+1": 0.6, "drsl+memory*3": 0.9, "drsl*0.3*0.1": 0.8, "drsl+memory*3+1": 0.7}
    tried = []

    def try_all(trials, grid, results, workers):
        tried.append([*trials])
        return {name: scores.get(name, 0.1) for name in trials if name != "drsl*3"}, 1

    monkeypatch.setattr(runner, "_try_all", try_all)
    losses = {"drsl": DRSL["drsl"], "drsl+memory": {"loss": {"name": "drsl", "drsl": {"memory_size": 64}}}}
    losses["drsl*0.3"] = {"loss": {"name": "drsl", "drsl": {"margin": 0.2}}}
    settings = {"drsl": [{"loss.drsl.temperature": 0.1}], "drsl+memory": [{"loss.drsl.temperature": 0.2}]}
    known = {"files": [DEMO], "seeds": range(1), "words": ["data.validation", "0.2"], "varied": [], "root": None}
    best, _, failed = runner.tune(losses, settings, known, Path("r"), 1)
    assert tried[1] == ["drsl*1+1", "drsl+memory*3+1"] and failed == 2
    weight, temperature = "loss.drsl.weight_m", "loss.drsl.temperature"
    assert [(of.get(weight), of.get(temperature)) for of in best.values()] == [(1.0, 0.1), (3.0, None), (0.1, None)]
    settings["drsl"].append({"loss.pml.kwargs": {"margin": 0.1}})
    for words, varied in (
        (["loss.drsl.weight_m", "0.5"], []),
        (["loss.pml.kwargs.margin", "0.5"], []),
        ([], [["loss.drsl.temperature", "0.5"]]),
    ):
        given = {**known, "words": [*known["words"], *words], "varied": varied}
        with pytest.raises(InputError, match=r"tune tries values of loss\..* itself: leave it out"):
            runner.tune(losses, settings, given, Path("r"), 1)
    monkeypatch.setattr(runner, "_try_all", lambda *given: ({"drsl+memory*3": 0.5}, 12))
    with pytest.raises(InputError, match="every trial of drsl failed"):
        runner.tune(losses, {}, known, Path("r"), 1)


TUNE = ["tune", str(DEMO), "--results", "r", "--losses", "drsl", "--output"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "train.lr", "1", "--results", "r"], "name a configuration file"),
        (["run", str(DEMO), "--results", "r", "--seeds", "0"], "--seeds must be 1 or more"),
        (["run", str(DEMO), "--results", "r", "--losses", "drls"], "did you mean 'drsl'"),
        (["tune", str(DEMO), "--results", "r"], "--output"),
        (["tune", str(DEMO), "--results", "r", "--output", "t", "--losses", "drsl"], "data.validation"),
        ([*TUNE, "no/t.yaml"], "--output no/t.yaml: there is no folder 'no'"),
        ([*TUNE, str(DEMO)], "would overwrite the input"),
        ([*TUNE, str(DEMO.parent / "losses.yaml")], "would overwrite the input"),
        ([*TUNE, "r"], "would overwrite the file of --results"),
        (["report", "none.jsonl"], "does not exist"),
        (["report", "none.jsonl", "--figure", "page.abc"], "page.abc: its name must end in .png"),
        (["report", "none.jsonl", "--output", "no/page.md"], "there is no folder 'no'"),
    ],
)
def test_wrong_words_are_explained_in_a_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("drsl-benchmark: ") and error.count("\n") == 1
    assert not os.listdir(tmp_path)
