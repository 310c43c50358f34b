"""The experiments from their command line to their page: what they run, what they keep, what they say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
import yaml
from image_folders import draw

from pml_drsl.benchmark.__main__ import main
from pml_drsl.benchmark.report import BEGIN, END, MARK, with_table
from pml_drsl.benchmark.training import costs, runner
from pml_drsl.benchmark.training.candidates import CROSS_ENTROPY, DRSL
from pml_drsl.benchmark.training.protocol import BESIDE, out_of_the_box, tuned
from pml_drsl.benchmark.training.results import Results
from pml_drsl.benchmark.training.trial import Trial

ROOT = Path(__file__).parents[3]
SMALL = ["--size", "16", "16", "--batch", "4", "2", "--quick"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("images"), 16)


def command(name, folder, file, *others):
    losses = [] if name in ("ablation", "batches") else ["--losses", "DRSL", "Circle"]
    return [name, "--train", str(folder), "--results", str(file), "--device", "cpu", *SMALL, *losses, *others]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A file that all experiments have added to; the processes of the first are two."""
    file = tmp_path_factory.mktemp("results") / "results.jsonl"
    assert main(command("quality", folder, file, "--workers", "2")) == 0
    assert main(command("imbalance", folder, file, "--workers", "1", "--seeds", "1")) == 0
    assert main(command("batches", folder, file, "--workers", "1", "--batches", "4", "8")) == 0
    assert main(command("ablation", folder, file, "--workers", "1")) == 0
    return file


@pytest.fixture
def file(whole, tmp_path):
    return Path(shutil.copy(whole, tmp_path / "results.jsonl"))


def no_run(monkeypatch):
    def run(*_):
        raise AssertionError("ran what is in the file")

    monkeypatch.setattr(runner, "run", run)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["defaults", "quality", "imbalance", "batches", "ablation"])
def test_what_is_in_the_file_is_not_run_again(experiment, folder, file, monkeypatch, capsys):
    no_run(monkeypatch)
    before = file.read_text()
    own = {"imbalance": ["--seeds", "1"], "batches": ["--batches", "4", "8"]}.get(experiment, [])
    assert main(command(experiment, folder, file, "--workers", "1", *own)) == 0
    assert file.read_text() == before
    assert "DRSL" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_cut_off_runs_again_with_the_same_numbers(folder, file):
    lines = file.read_text().splitlines(keepends=True)
    first = json.loads(lines[1])
    file.write_text("".join([lines[0], *lines[2:-1], lines[-1][:40]]))
    assert main(command("quality", folder, file, "--workers", "1")) == 0
    assert main(command("ablation", folder, file, "--workers", "1")) == 0
    again = Results(file)
    assert again.found.keys() == {Trial(**json.loads(line)["trial"]).key for line in lines if '"trial"' in line}
    found = again.found[Trial(**first["trial"]).key]
    assert (found["scores"], found["identities"]) == (first["scores"], first["identities"])


@pytest.mark.slow
def test_settings_are_chosen_on_validation(file):
    results = Results(file)
    (name,) = results.sets
    best = tuned(results, name, "Circle")
    assert best.split == "test" and len(results.seeds(best)) == 2
    splits = {trial.split for trial in results.trials()}
    assert splits == {"test", "fold 0", "fold 1"}
    for seed in (0, 1):
        tested = results.found[best.but(seed=seed).key]["identities"]
        assert sum(score is not None for score in tested) == 8


@pytest.mark.slow
def test_the_page_is_made_of_the_file_and_keeps_what_was_written_by_hand(file, tmp_path):
    page, readme = tmp_path / "page.md", tmp_path / "README.md"
    page.write_text(f"# Ours\n\nBy hand.\n\n{MARK}\nstale")
    readme.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    assert main(["report", str(file), "--output", str(page), "--readme", str(readme)]) == 0
    text = page.read_text()
    assert text.startswith(f"# Ours\n\nBy hand.\n\n{MARK}\n") and "stale" not in text
    results = Results(file)
    (name,) = results.sets
    scores = [results.score(one) for one in results.seeds(out_of_the_box(name, "Circle")[BESIDE])]
    assert len(scores) == 2
    row = next(line for line in text.partition("| beside")[2].splitlines() if line.startswith("| Circle"))
    assert f"{100 * fmean(scores):.1f} ± {100 * stdev(scores):.1f}" in row
    for picture in ("quality", "imbalance"):
        assert (tmp_path / f"page-{picture}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"page-{picture}.png" in text
    for heading in ("Out of the box", "Tuned", "Few positives", "Ablation", "Costs"):
        assert f"## {heading}\n" in text
    tried = text.partition("| tried")[2].partition("\n\n")[0]
    assert "| Circle" in tried and "| SupCon" not in tried
    assert f"{100 * fmean(scores):.1f}" in readme.read_text() and "stale" not in readme.read_text()
    assert main(["report", str(file), "--output", str(page)]) == 0
    assert page.read_text() == text


@pytest.mark.slow
def test_a_report_reads_a_file_that_is_being_written_and_leaves_it_as_it_is(file, tmp_path):
    with file.open("a") as still_writing:
        still_writing.write('{"trial": {"data"')
    before = file.read_bytes()
    assert main(["report", str(file), "--output", str(tmp_path / "page.md")]) == 0
    assert file.read_bytes() == before


def test_several_sets_share_one_file(folder, tmp_path, capsys):
    """The first seed of every set comes before the second seed of any; a set can be added later."""
    images = {"folder": str(folder), "size": [16, 16]}
    training = {"identities": 4, "instances": 2}
    described = {
        name: {"images": {**images, "seeds": seeds}, "training": training} for name, seeds in (("a", 2), ("b", 1))
    }
    sets, file = tmp_path / "sets.yaml", tmp_path / "results.jsonl"
    sets.write_text(yaml.safe_dump(described))
    arguments = [
        "defaults",
        "--sets",
        str(sets),
        "--quick",
        "--results",
        str(file),
        "--workers",
        "1",
        "--device",
        "cpu",
    ]
    arguments += ["--losses", DRSL, CROSS_ENTROPY]
    assert main([*arguments, "--only", "a", "--seeds", "1"]) == 0
    assert main(arguments) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    order = [(row["trial"]["set"], row["trial"]["seed"]) for row in rows if "trial" in row]
    assert order == [("a", 0)] * 3 + [("b", 0)] * 3 + [("a", 1)] * 3 + [("b", 1)] * 3
    assert "a, MAP@R" in capsys.readouterr().out
    assert main([*arguments, "--size", "16", "16"]) == 2
    assert "describes one data set" in capsys.readouterr().err


def test_the_readme_says_what_the_results_say():
    """The table between the marks of README.md is made of docs/benchmark.jsonl."""
    file, readme = ROOT / "docs" / "benchmark.jsonl", ROOT / "README.md"
    if not file.exists():
        pytest.skip("no results have been published under this protocol")
    assert with_table(readme, Results(file)) == readme.read_text(encoding="utf-8")


def test_imbalance_refuses_a_loss_that_cannot_stand_behind_a_memory(folder, tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    with pytest.raises(SystemExit):
        main(command("imbalance", folder, file, "--losses", "NTXent"))
    assert "invalid choice: 'NTXent'" in capsys.readouterr().err and not file.exists()


@pytest.mark.parametrize("size", ["3", "2", "16"])
def test_batches_that_a_fold_cannot_make_are_refused(size, folder, tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    assert main(command("batches", folder, file, "--batches", "4", size)) == 2
    assert f"--batches {size}: " in (error := capsys.readouterr().err) and "a multiple of 2 from 4 to 8" in error
    assert not file.exists()


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
from pml_drsl.benchmark.training.runner import _start

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


@pytest.mark.slow
def test_costs_of_a_further_loss_are_measured_beside_those_of_the_others(folder, file, monkeypatch):
    text = file.read_text() + '{"costs":{"SupCon":{"seconds":1.0,"peak_bytes":1}}}\n'
    file.write_text(text)
    (name,) = Results(file).sets
    assert set(Results(file).costs[name]) == {"DRSL", "Circle"}
    monkeypatch.setattr(costs, "SECONDS_OF_TURNS", 0.1)
    assert main([*command("quality", folder, file, "--workers", "1"), "--losses", "SupCon"]) == 0
    found = Results(file).costs
    assert set(found) == {name} and set(found[name]) == {"DRSL", "Circle", "SupCon"}
    (row,) = [line for line in file.read_text().splitlines()[len(text.splitlines()) :] if '"costs"' in line]
    assert json.loads(row)["costs"] == found[name]


@pytest.mark.slow
def test_another_recipe_needs_another_file(folder, file, capsys):
    before = file.read_text()
    assert main(command("quality", folder, file, "--lr", "0.5")) == 2
    assert "lr 0.002, not 0.5" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "0"], "--seeds must be 1 or more, got 0"),
        (["--batch", "4", "1"], "a query needs a positive"),
        (["--size", "8", "8"], "give two of 16 or more"),
        (["--results", "missing/results.jsonl"], "its folder does not exist"),
        (["--workers", "0"], "--workers must be 1 or more, got 0"),
        (["--results", "."], "cannot be written"),
        (["--network", "conv5"], "network conv5: "),
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

    monkeypatch.setattr(runner, "run", diverges)
    file = tmp_path / "results.jsonl"
    assert main(command("defaults", folder, file, "--workers", "1", "--losses", "DRSL")) == 0
    assert {row["failure"] for row in Results(file).found.values()} == {"the loss is nan"}
    assert all(Results(file).score(trial) == 0 for trial in Results(file).trials())
