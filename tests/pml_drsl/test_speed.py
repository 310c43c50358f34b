"""``drsl-benchmark speed``: what it measures and writes. Its figures are for people, and no test holds them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from pml_drsl import machine, speed

HAS_CUDA = torch.cuda.is_available()


def test_a_row_for_each_loss_and_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.csv"
    sizes = ["--sizes", "16", "32", "--dims", "8", "--seconds", "0.01", "--threads", "1"]
    assert speed.main([*sizes, "--csv", str(path)]) == 0
    rows = pd.read_csv(path)
    names = [speed.FLOOR, *speed.LOSSES]
    assert list(zip(rows["size"], rows["loss"], strict=True)) == [(n, name) for n in (16, 32) for name in names]
    assert (rows["rounds"] >= speed.FEWEST_ROUNDS).all() and (rows["seconds"] > 0).all()
    assert (rows.loc[rows["loss"] == speed.FLOOR, "ratio"] == 1).all()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    heads = [line for line in lines if line[:2] == ["|", "size"]]
    assert heads == [f"| {' | '.join(['size', *names])} |".split()] * 3


def test_ratios_are_taken_round_by_round() -> None:
    times = {speed.FLOOR: [1.0, 10.0, 2.0], "DRSL": [2.0, 15.0, 6.0]}  # ratios 2, 1.5 and 3; of the medians, 3
    peaks = {speed.FLOOR: math.nan, "DRSL": 2.0, "SmoothAP": None}
    table = speed.summarize(times, peaks)
    rows = {row["loss"]: row for row in table.to_dict("records")}
    assert (rows["DRSL"]["ratio"], rows["DRSL"]["seconds"], rows["DRSL"]["peak_mib"]) == (2.0, 6.0, 2.0)
    assert rows["SmoothAP"]["ratio"] != rows["SmoothAP"]["ratio"] and rows["SmoothAP"]["rounds"] == 0
    table = " ".join(speed.report(table.assign(dim=8, size=1024)).split())
    assert "| 1,024 | 1.00 | 2.00 | does not fit |" in table
    assert "| 1,024 | not measured | 2.0 | does not fit |" in table


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the limit and forgets an earlier peak")
def test_memory_is_that_of_the_step() -> None:
    step = speed.make_step(speed.FLOOR, 2048, 16, "cpu")
    before = torch.ones(2**24)  # 64 MiB that the step does not need
    del before
    peak = speed.peak_mib(step, 4.0, "cpu")
    assert peak is not None and 16 < peak < 200  # the matrix has 16 MiB
    assert speed.peak_mib(speed.make_step("SmoothAP", 512, 8, "cpu"), 0.25, "cpu") is None
    torch.ones(2**28)  # The limit is gone.


# The system keeps the largest memory of a process (ru_maxrss) when another program takes its place.
FROM_A_BIG_PROCESS = """
import os, sys
if sys.argv[1] == "big":
    big = b"1" * 2**28
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[2], "small", ""])
from pml_drsl.machine import peak_process_bytes
before = peak_process_bytes(reset=True)
added = b"1" * 2**25
print(peak_process_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says the peak since a moment")
def test_memory_is_measured_from_now_on_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", FROM_A_BIG_PROCESS, "big", FROM_A_BIG_PROCESS]
    assert 2**24 < int(subprocess.check_output(command)) < 2**26

    def refuse(*_: object) -> None:
        raise PermissionError

    for name in ("read_text", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(machine.Path, name, refuse)
            assert machine.peak_process_bytes(reset=True) is None
    monkeypatch.setattr(machine, "peak_process_bytes", lambda reset=False: None)
    assert math.isnan(speed.peak_mib(lambda: None, 4.0, "cpu") or 0)


def test_the_evaluation_beside_its_distances(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("QUERIES", 20), ("GALLERY", 60), ("IDENTITIES", 5)):
        monkeypatch.setattr(speed, name, value)
    assert speed.main(["--evaluation", "--dims", "8", "--seconds", "0.01"]) == 0
    assert "| size | distance matrix | evaluation |" in " ".join(capsys.readouterr().out.split())


def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        (["--sizes", "6"], "--sizes 6: give multiples of 4"),
        (["--dims", "0"], "--dims 0: give a number above 0"),
        (["--csv", str(tmp_path / "no" / "s.csv")], "there is no folder"),
        *([] if HAS_CUDA else [(["--device", "cuda"], "finds no CUDA device")]),
    ]
    monkeypatch.setitem(sys.modules, "pandas", None)
    cases.append(([], 'the package pandas is not installed: run pip install -e ".[benchmark]" in the clone'))
    for arguments, message in cases[-1:]:
        assert speed.main(arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.undo()
    for arguments, message in cases[:-1]:
        assert speed.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("what", ["losses", "evaluation"] if HAS_CUDA else [])
def test_on_cuda(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--evaluation"] if what == "evaluation" else ["--sizes", "64", "256", "--losses", "DRSL", "SupCon"]
    assert speed.main(["--device", "cuda", "--dims", "64", "--seconds", "0.1", *options]) == 0
    output = capsys.readouterr().out
    assert torch.cuda.get_device_name() in output and "does not fit" not in output


@pytest.mark.cuda
@pytest.mark.parametrize("size", [2**22] if HAS_CUDA else [])
def test_peak_memory_on_cuda_is_the_steps_own(size: int) -> None:
    kept = torch.ones(size, device="cuda")
    assert speed.peak_mib(lambda: kept + 1, 4.0, "cuda") == pytest.approx(size * 4 / 2**20)
