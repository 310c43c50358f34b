"""The quality benchmark from its command line to its page: what it runs, what it keeps, what it says."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from image_folders import draw

from pml_drsl.benchmark import plots, tables
from pml_drsl.benchmark.__main__ import main
from pml_drsl.benchmark.quality import ranked
from pml_drsl.benchmark.report import MARK
from pml_drsl.benchmark.training import costs, experiment
from pml_drsl.benchmark.training import results as results_module
from pml_drsl.benchmark.training.results import Protocol, Results
from pml_drsl.benchmark.training.trial import Trial
from pml_drsl.benchmark.training.tuning import (
    ALONE,
    BEST,
    CROSS_ENTROPY,
    MEMORY,
    at_other_rates,
    best_first,
    best_of,
    finalists,
    recipes_of,
    reported,
    settings,
)

SMALL = ["--size", "16", "16", "--batch", "4", "2", "--quick"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("images"), 16)


def command(name, folder, file, *others):
    losses = [] if name == "ablation" else ["--losses", "DRSL", "Circle"]
    return [name, "--train", str(folder), "--results", str(file), "--device", "cpu", *SMALL, *losses, *others]


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
def test_settings_are_chosen_on_validation(file):
    results = Results(file)
    protocol = results.protocol
    tried = [trial for trial in settings(protocol, "DRSL") if trial in results]
    assert len(tried) == 2 and {trial.split for trial in tried} == {"validation"}
    best = max(tried, key=results.score)
    assert best_first(results, tried)[0] == best
    assert best_of(results, protocol, "DRSL", ALONE) == best
    assert {trial.split for trial in reported(results, protocol, "DRSL").values()} == {"test"}


def test_finalists_are_told_apart_by_all_their_runs(tmp_path):
    """Every trial has a made-up score; what is best of one run is not best of three."""
    protocol = Protocol(Trial("made up", "test", "DRSL"), tuning_seeds=3)

    def add(trials, score, seeds=1):
        for number, trial in enumerate(trials):
            for seed in range(seeds):
                # the first of them is lucky once
                value = score - 0.01 * number - (0.5 if number == 0 and seed > 0 else 0)
                results.add(trial.but(seed=seed), {"scores": {"MAP@R": value}})

    with Results.opened(tmp_path / "results.jsonl") as results:
        results.agree(protocol)
        assert list(recipes_of(results, protocol, "DRSL")[ALONE]) == settings(protocol, "DRSL")
        add(settings(protocol, "DRSL"), 0.5)
        best, second = settings(protocol, "DRSL")[:2]
        recipes = recipes_of(results, protocol, "DRSL")
        assert [trial.but(cross_entropy=0.0) for trial in recipes[CROSS_ENTROPY]] == [best, best, second, second]
        assert recipes[MEMORY] == [best.but(memory=1024), second.but(memory=1024)]
        add(recipes[CROSS_ENTROPY], 0.8)
        [slower, faster] = at_other_rates(results, protocol, "DRSL")
        assert slower == recipes[CROSS_ENTROPY][0].but(lr=0.001) and faster == slower.but(lr=0.004)
        add([slower], 0.9)
        found = finalists(results, protocol, "DRSL")
        assert found == [slower, *recipes[CROSS_ENTROPY][:2]]
        assert best_of(results, protocol, "DRSL", BEST) is None
        add(found, 0.9, seeds=3)
        assert best_of(results, protocol, "DRSL", BEST) == found[1]
        assert set(reported(results, protocol, "DRSL")) == {ALONE, CROSS_ENTROPY, BEST}


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
def test_the_best_comes_first_by_the_recipe_that_validation_chose(file):
    results = Results(file)
    lines = file.read_text().splitlines()
    best = reported(results, results.protocol, "Circle")[BEST]
    for number, line in enumerate(lines):
        row = json.loads(line)
        if row.get("trial", {}).get("split") == "test":
            trial = Trial(**row["trial"])
            # Circle's best recipe does worst of all; its others, where they are others, best of all
            score = 0.0 if trial.but(seed=0) == best else 0.9 if trial.loss == "Circle" else 0.5
            lines[number] = json.dumps({**row, "scores": {**row["scores"], "MAP@R": score}})
    file.write_text("\n".join(lines) + "\n")
    assert list(ranked(Results(file), results.protocol)) == ["DRSL", "Circle"]


@pytest.mark.slow
def test_a_report_reads_a_file_that_is_being_written_and_leaves_it_as_it_is(file, tmp_path):
    with file.open("a") as still_writing:
        still_writing.write('{"trial": {"data"')
    before = file.read_bytes()
    assert main(["report", str(file), "--output", str(tmp_path / "page.md")]) == 0
    assert file.read_bytes() == before


@pytest.mark.slow
def test_a_page_has_no_ablation_of_what_only_tuning_tried(file, tmp_path):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    protocol = Results(file).protocol
    tried = settings(protocol, "DRSL")
    kept = [row for row in rows if "trial" not in row or Trial(**row["trial"]) in tried]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert main(["report", str(file), "--output", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "## Protocol" in text and "## Ablation" not in text and "## Quality" not in text


def test_quick_runs_the_losses_that_are_asked_for(folder, tmp_path):
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    _, *arguments = command("quality", folder, tmp_path / "results.jsonl", "--losses", "SupCon")
    with experiment.prepare(parser.parse_args(arguments)) as bench:
        assert bench.losses == ("SupCon",)


def test_imbalance_without_drsl_is_refused(folder, tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    assert main(command("imbalance", folder, file, "--losses", "Circle")) == 2
    assert "name it too" in capsys.readouterr().err and not file.exists()


def test_one_command_at_a_time_adds_to_a_file(folder, tmp_path, capsys):
    pytest.importorskip("fcntl")
    file = tmp_path / "results.jsonl"
    with Results.opened(file):
        assert main(command("quality", folder, file)) == 2
    assert "another drsl-benchmark is adding to" in capsys.readouterr().err
    with Results.opened(file):
        pass


def test_no_process_outlives_one_that_is_killed():
    """A process that waits for work, with nothing to notice by that none will come."""
    script = """
import os, signal
from concurrent.futures import ProcessPoolExecutor
from pml_drsl.benchmark.timing.measure import clean_processes
from pml_drsl.benchmark.training.results import _start

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, clean_processes(), _start, (None, "cpu", 1, None))
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run = [sys.executable, "-c", script]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        # Its processes have its output too: that ends when the last of them has.
        try:
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            raise
    assert process.returncode == -9 and int(output) > 0


def test_the_memory_of_a_step_is_the_most_it_has_at_once():
    def step():
        first = torch.empty(2**18)
        second = torch.empty(2**18)
        del first
        return second, torch.empty(2**17)

    kept = torch.empty(2**20)
    assert costs.peak_bytes(step, "cpu") == 2 * 2**20
    assert kept.numel() == 2**20


def test_a_grid_is_told_by_its_values_only_where_it_has_all_combinations():
    points = [{"m": m, "gamma": gamma} for m in (0.25, 0.4) for gamma in (40, 80)]
    assert tables.grid(points) == "m 0.25, 0.4 x gamma 40, 80"
    assert tables.grid(points[:3]) == "m 0.25 gamma 40; m 0.25 gamma 80; m 0.4 gamma 40"


def test_an_axis_leaves_out_only_what_is_far_below_all_others():
    low, high = plots._bulk([(60.0 + step, 0.5) for step in range(8)] + [(11.0, 0.0)])
    assert 55 < low < 59.5 and 67.5 < high < 70
    low, _ = plots._bulk([(60.0, 0.0), (65.0, 0.0), (57.0, 0.0)])
    assert low < 57


@pytest.mark.slow
def test_another_protocol_needs_another_file(folder, file, capsys):
    before = file.read_text()
    assert main(command("quality", folder, file, "--lr", "0.5")) == 2
    assert "lr 0.002, not 0.5" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "0"], "--seeds must be 1 or more, got 0"),
        (["--batch", "4", "1"], "a query needs a positive"),
        (["--size", "8", "8"], "give 16 or more"),
        (["--results", "missing/results.jsonl"], "its folder does not exist"),
        (["--workers", "0"], "--workers must be 1 or more, got 0"),
        (["--results", "."], "cannot be written"),
        (["--network", "conv5"], "--network conv5: "),
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
    monkeypatch.setattr("pml_drsl.benchmark.training.costs.measure", lambda *_: None)
    assert main(bench_trials) == 0
    assert {row["failure"] for row in Results(file).found.values()} == {"the loss is nan"}
    assert all(Results(file).score(trial) == 0 for trial in Results(file).trials())
