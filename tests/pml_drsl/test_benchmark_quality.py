"""The quality benchmark from its command line to its page: what it runs, what it keeps, what it says."""

import json
import shutil
from pathlib import Path
from statistics import fmean, stdev

import pytest
from image_folders import draw

from pml_drsl.benchmark import results as results_module
from pml_drsl.benchmark.__main__ import main
from pml_drsl.benchmark.report import MARK
from pml_drsl.benchmark.results import Results
from pml_drsl.benchmark.trial import Trial
from pml_drsl.benchmark.tuning import ALONE, best_first, chosen, reported, settings

SMALL = ["--size", "16", "16", "--batch", "4", "2", "--quick", "--losses", "DRSL", "Circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("images"), 16)


def command(name, folder, file, *others):
    return [name, "--train", str(folder), "--results", str(file), "--device", "cpu", *SMALL, *others]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A file that all three experiments have added to; the processes of the first are two."""
    file = tmp_path_factory.mktemp("results") / "results.jsonl"
    assert main(command("quality", folder, file, "--workers", "2")) == 0
    assert main(command("imbalance", folder, file, "--workers", "1")) == 0
    assert main(command("ablation", folder, file, "--workers", "1", "--seeds", "1")) == 0
    return file


@pytest.fixture
def file(whole, tmp_path):
    return Path(shutil.copy(whole, tmp_path / "results.jsonl"))


def no_run(monkeypatch):
    def run(*_):
        raise AssertionError("ran what is in the file")

    monkeypatch.setattr(results_module, "run", run)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["quality", "imbalance", "ablation"])
def test_what_is_in_the_file_is_not_run_again(experiment, folder, file, monkeypatch, capsys):
    no_run(monkeypatch)
    before = file.read_text()
    assert main(command(experiment, folder, file, "--workers", "1")) == 0
    assert file.read_text() == before
    assert "DRSL" in capsys.readouterr().out or experiment == "ablation"


@pytest.mark.slow
def test_what_is_cut_off_runs_again_with_the_same_numbers(folder, file):
    lines = file.read_text().splitlines(keepends=True)
    scores = json.loads(lines[1])["scores"]
    file.write_text("".join([lines[0], *lines[2:-1], lines[-1][:40]]))
    assert main(command("quality", folder, file, "--workers", "1")) == 0
    assert main(command("ablation", folder, file, "--workers", "1", "--seeds", "1")) == 0
    again = Results(file)
    assert again.found.keys() == {Trial(**json.loads(line)["trial"]).key for line in lines if '"trial"' in line}
    assert (
        next(row["scores"] for row in again.found.values() if row["trial"] == json.loads(lines[1])["trial"]) == scores
    )


@pytest.mark.slow
def test_settings_are_chosen_on_validation_and_by_the_mean_over_seeds(file):
    results = Results(file)
    protocol = results.protocol
    tried = [trial for trial in settings(protocol, "DRSL") if trial in results]
    assert len(tried) == 2 and {trial.split for trial in tried} == {"validation"}
    best = max(tried, key=results.score)
    assert best_first(results, protocol, tried)[0] == best
    assert chosen(results, protocol, "DRSL")[ALONE].parameters == best.parameters
    assert {trial.split for trial in reported(results, protocol, "DRSL").values()} == {"test"}


@pytest.mark.slow
def test_the_page_is_made_of_the_file_and_keeps_what_was_written_by_hand(file, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Ours\n\nBy hand.\n\n{MARK}\nold")
    assert main(["report", str(file), "--output", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"# Ours\n\nBy hand.\n\n{MARK}\n") and "old" not in text
    results = Results(file)
    alone = reported(results, results.protocol, "Circle")[ALONE]
    scores = [results.score(alone.but(seed=seed)) for seed in (0, 1)]
    row = next(line for line in text.splitlines() if line.startswith("| Circle") and "| alone" in line)
    assert f"{100 * fmean(scores):.1f} ± {100 * stdev(scores):.1f}" in row
    for name in ("quality", "imbalance", "ablation"):
        assert (tmp_path / f"page-{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"page-{name}.png" in text
    assert main(["report", str(file), "--output", str(page)]) == 0
    assert page.read_text() == text


@pytest.mark.slow
def test_another_protocol_needs_another_file(folder, file, capsys):
    before = file.read_text()
    assert main(command("quality", folder, file, "--lr", "0.5")) == 2
    assert "lr 0.001, not 0.5" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "0"], "--seeds must be 1 or more, got 0"),
        (["--batch", "4", "1"], "a query needs a positive"),
        (["--size", "8", "8"], "give 16 or more"),
        (["--results", "missing/results.jsonl"], "its folder does not exist"),
        (["--workers", "0"], "--workers must be 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, words, folder, tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    assert main(command("quality", folder, file, *arguments)) == 2
    assert words in capsys.readouterr().err
    assert not file.exists()


def test_a_file_that_holds_something_else_is_refused(folder, tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    file.write_text('{"loss": 1}\n')
    assert main(command("quality", folder, file)) == 2
    assert "line 1 is not a result of this benchmark" in capsys.readouterr().err
    assert file.read_text() == '{"loss": 1}\n'


def test_a_report_of_nothing_says_what_to_run(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none.jsonl")]) == 2
    assert "run drsl-benchmark quality" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_a_result(folder, tmp_path, monkeypatch):
    def diverges(*_):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(results_module, "run", diverges)
    file = tmp_path / "results.jsonl"
    bench_trials = command("quality", folder, file, "--workers", "1", "--losses", "DRSL")
    monkeypatch.setattr("pml_drsl.benchmark.costs.measure", lambda *_: None)
    assert main(bench_trials) == 0
    assert {row["failure"] for row in Results(file).found.values()} == {"the loss is nan"}
    assert all(Results(file).score(trial) == 0 for trial in Results(file).trials())
