"""The speed benchmark's plumbing; its figures are for people to read, not for a test to hold."""

import csv
import json
import os
import sys
import time
from functools import partial

import pytest
import torch

from pml_drsl.benchmark.__main__ import main
from pml_drsl.benchmark.timing import measure
from pml_drsl.benchmark.timing import table as speed_report


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    losses = ["DRSL", "SmoothAP", "SupCon"]
    arguments = ["speed", "--sizes", "16", "32", "--dims", "8", "--seconds", "0.05", "--losses", *losses]
    files = {kind: folder / f"speed.{kind}" for kind in ("json", "csv", "md", "png")}
    options = {"--json": "json", "--csv": "csv", "--markdown": "md", "--plot": "png"}
    status = main([*arguments, *(word for flag, kind in options.items() for word in (flag, str(files[kind])))])
    return status, files, ["floor", *losses]


def test_writes_the_same_rows_to_every_file(outcome):
    status, files, losses = outcome
    assert status == 0
    rows = json.loads(files["json"].read_text())["rows"]
    assert [(row["loss"], row["size"]) for row in rows] == [(loss, size) for size in (16, 32) for loss in losses]
    with open(files["csv"], newline="") as file:
        assert [row["loss"] for row in csv.DictReader(file)] == losses * 2
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    assert files["md"].read_text().startswith("8 dimensions")
    for row in rows:
        assert row["seconds"] > 0
        assert row["rounds"] >= 1
        assert row["ratio"] == 1 if row["loss"] == "floor" else row["ratio"] > 0


def test_markdown_has_a_table_for_each_dimension():
    def row(loss, size, dim, ratio, note=""):
        return speed_report.Row(loss, size, dim, 1.0, ratio, 1, 3, note)

    rows = [
        row("floor", 16, 8, 1.0),
        row("DRSL", 16, 8, 1.234),
        row("SmoothAP", 16, 8, 1234.5),
        row("floor", 32, 8, 1.0),
        row("DRSL", 32, 8, 2.0),
        row("SmoothAP", 32, 8, None, "does not fit in 8 GiB"),
        row("floor", 16, 2048, 1.0),
        row("DRSL", 16, 2048, 3.0),
    ]
    first, second = speed_report.markdown(rows).split("\n2,048 dimensions")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines() if "|" in line]
    assert lines[0] == ["embeddings", "DRSL (default)", "SmoothAP"]
    assert lines[2:] == [["16", "1.23", "1,234"], ["32", "2.00", "does not fit"]]
    assert all(cell.endswith("-:") for cell in lines[1])
    assert "3.00 |" in second and "SmoothAP" not in second


def test_ratios_are_taken_round_by_round(monkeypatch, capsys):
    times = {"floor": [1.0, 10.0, 2.0], "DRSL": [2.0, 15.0, 6.0]}  # ratios 2, 1.5 and 3; of the medians, 3
    monkeypatch.setattr(measure, "take_turns", lambda *_: times)
    monkeypatch.setattr(measure, "probe", lambda *_: measure.Probe(0.1, 1000))
    assert main(["speed", "--sizes", "16", "--dims", "4", "--losses", "DRSL"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  DRSL (default)"))
    assert line.split()[2:5] == ["6.00", "s", "2.00"]


@pytest.mark.parametrize(("threads", "counts"), [(1, False), (2, True)])
def test_waiting_does_not_count_with_one_thread(threads, counts):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = measure.take_turns({"wait": lambda: time.sleep(0.05)}, 0.01, "cpu")["wait"]
    finally:
        torch.set_num_threads(before)
    assert len(times) == measure.FEWEST_ROUNDS
    assert min(times) >= 0.05 if counts else max(times) < 0.05


def test_what_needs_too_much_memory_or_time_is_said_so():
    make = partial(measure.make_step, "SmoothAP", dim=8, device="cpu")
    probe = measure.probe(make, 512, "cpu", 1, memory=0.25, time_limit=60)
    assert probe == measure.Probe(failure="does not fit in 0.25 GiB")
    probe = measure.probe(make, 512, "cpu", 1, memory=8, time_limit=0.01)
    assert probe == measure.Probe(failure="skipped: over 0 s")


def test_peak_memory_is_that_of_the_step():
    size, dim = 2048, 16
    make = partial(measure.make_step, "floor", dim=dim, device="cpu")
    peak = measure.probe(make, size, "cpu", 1, memory=4, time_limit=None).peak
    matrix = 4 * size * size
    assert matrix < peak < 12 * matrix


def smaller_than_warm_up(size):
    """A step that takes 40 MB in pieces. The step of the warm-up takes 200 MB in pieces."""
    number = 5000 if size == measure.WARM_UP_SIZE else 1000
    return lambda: [torch.ones(10_000) for _ in range(number)]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux can forget an earlier peak")
def test_peak_memory_leaves_out_what_the_process_held_before():
    peak = measure.probe(smaller_than_warm_up, 100, "cpu", 1, memory=4, time_limit=None).peak
    assert 35e6 < peak < 60e6


def test_floor_and_losses_have_gradients_of_the_embeddings():
    for name in ("floor", *measure.LOSSES):
        measure.make_step(name, 16, 4, "cpu")()


def test_smooth_ap_note_shows_what_pml_s_loss_gives():
    assert speed_report.smooth_ap_note().splitlines()[-1].strip().startswith("0.3")


def test_bad_arguments_are_told(capsys, tmp_path):
    assert main(["speed", "--sizes", "0"]) == 2
    assert "--sizes must be above 0, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["speed", "--json", str(tmp_path / "no" / "s.json")])
    assert "s.json: not a file in a folder that exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sped"])
    assert "invalid choice: 'sped'" in capsys.readouterr().err


def test_processes_are_compared_with_one_and_their_bytes_counted(tmp_path, capfd):
    files = {kind: tmp_path / f"speed.{kind}" for kind in ("json", "csv")}
    arguments = ["speed", "--processes", "2", "--sizes", "28", "--dims", "8", "--seconds", "0.01", "--threads", "1"]
    paths = ["--json", str(files["json"]), "--csv", str(files["csv"])]
    assert main([*arguments, "--losses", "DRSL", "SupCon", *paths]) == 0
    rows = json.loads(files["json"].read_text())["rows"]
    ways = [("DRSL", False, 1), ("DRSL", True, 2), ("DRSL", False, 2), ("SupCon", False, 1), ("SupCon", False, 2)]
    assert [(row["loss"], row["efficient"], row["processes"]) for row in rows] == ways
    # Half of the 28 embeddings of 8 floats, of their 28 labels, and of the two lengths of each gathering.
    gathered = 14 * 8 * 4 + 14 * 8 + 2 * 8
    # And, where every process computes the whole loss, the state of the first one's random numbers.
    whole = gathered + torch.get_rng_state().nbytes // 2
    assert [row["bytes_moved"] for row in rows if not row["efficient"]] == [0, whole, 0, whole]
    # Efficient: the retrieval error of each of 42 pairs is gathered. Its gradient, and that of the embeddings, is
    # summed: half of it goes out and comes back.
    efficient = next(row["bytes_moved"] for row in rows if row["efficient"])
    assert efficient == gathered + 42 * 4 + 84 * 4 + 28 * 8 * 4
    for row in rows:
        assert row["size"] == 28 and row["rounds"] >= 3 and row["seconds"] > 0
        assert row["ratio"] == 1 if row["processes"] == 1 else row["ratio"] > 0
    with open(files["csv"], newline="") as file:
        assert [row["bytes_moved"] for row in csv.DictReader(file)] == [str(row["bytes_moved"]) for row in rows]
    assert "DRSL, efficient" in capfd.readouterr().out


def test_a_loss_is_compared_with_the_step_of_a_network(tmp_path, capsys):
    pytest.importorskip("torchreid")
    arguments = ["speed", "--step", "osnet_x0_25", "--sizes", "8", "--losses", "DRSL", "--seconds", "0.01"]
    assert main([*arguments, "--json", str(tmp_path / "s.json")]) == 0
    (row,) = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert (row["network"], row["dim"], row["size"]) == ("osnet_x0_25", 512, 8)
    assert 0 < row["share"] < 1
    assert main(["speed", "--step", "osnet_x9"]) == 2
    assert "--step osnet_x9: not a network of torchreid" in capsys.readouterr().err


def test_step_without_torchreid_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchreid", None)
    assert main(["speed", "--step", "osnet_x0_25"]) == 2
    assert "needs torchreid: pip install 'pml-drsl[reid]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "0"], "--processes must be above 0, got 0"),
        (["--sizes", "16", "3"], "--sizes 3: there are 4 embeddings of each identity"),
        (["--sizes", "4"], "give multiples of 4 from 8 on"),
        (["--processes", "9", "--sizes", "8"], "--processes 9: more than the 8 embeddings of --sizes"),
        (["--processes", "2", "--step", "osnet_x0_25"], "choose one"),
        (["--processes", "2", "--markdown", "x.md"], "choose one"),
        pytest.param(
            ["--processes", "2", "--device", "cuda"],
            "there are 0 CUDA devices",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there are CUDA devices"),
        ),
    ],
)
def test_bad_ways_are_told_before_the_work(options, message, capsys):
    assert main(["speed", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["speed", "--help"]])
def test_help_teaches(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "matrix" in capsys.readouterr().out


def test_a_missing_dependency_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("it must be told before the work"))
    assert main(["speed", "--plot", "x.png"]) == 2
    assert "needs matplotlib: pip install 'pml-drsl[benchmark]'" in capsys.readouterr().err
