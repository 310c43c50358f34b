"""``drsl-benchmark gpu``: its table, its time limits and its exit status, with its parts rehearsed on the CPU."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from pml_drsl.benchmark.__main__ import main
from pml_drsl.benchmark.timing import gpu, gpu_checks, gpu_parts, gpu_speed, measure
from pml_drsl.benchmark.timing.gpu_row import Row, Setting

on_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Stands in for the module of the parts. Each part does what its name says.
STUB = """
import json, subprocess, sys, time
part, device, folder, results = sys.argv[1:5]
print("printed by", part)
with open(results, "a") as file:
    file.write(json.dumps({"measurement": "first", "figure": device, "passed": True}) + "\\n")
if part == "fails":
    raise RuntimeError("broken | here")
if part == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(folder + "/child", "w").write(str(child.pid))
    time.sleep(600)
if part == "silent":
    open(results, "w")
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stub_parts.py").write_text(STUB)
    monkeypatch.setattr(gpu, "MODULE", "stub_parts")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parts = {name: gpu_parts.Part(name.upper(), gpu_checks.tests, 60.0) for name in ("works", "fails", "silent")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    return tmp_path


def run_stub(folder: Path, part: str, seconds: float = 60) -> list[Row]:
    return gpu.run_part(part, "cpu", True, folder, folder / "log", seconds)


def test_a_part_that_fails_keeps_its_rows_and_says_why(stub: Path) -> None:
    assert run_stub(stub, "works") == [Row("first", "cpu")]
    first, error = run_stub(stub, "fails")
    assert first == Row("first", "cpu")
    assert error == Row("error", "`RuntimeError: broken | here` (status 1)", False)
    assert gpu.tail(stub / "log").startswith("printed by fails\nTraceback")
    assert run_stub(stub, "silent") == [Row("error", "the part gave no result", False)]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_a_part_that_hangs_is_killed_with_its_children(stub: Path) -> None:
    rows = run_stub(stub, "hangs", seconds=5)
    assert rows == [Row("first", "cpu"), Row("time limit", "stopped after 5 s", False)]
    child, end = int((stub / "child").read_text()), time.monotonic() + 30
    while alive(child):
        assert time.monotonic() < end, "the child process of the part is still there"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed process stays as a zombie until its parent or init waits for it.
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_part_that_fails_does_not_stop_the_others(stub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = stub / "gpu.md"
    assert main(["gpu", "--device", "cpu", "--quick", "--output", str(page), "--parts", "fails", "works"]) == 1
    text = page.read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert "Rehearsal on the CPU" in text and f"torch {torch.__version__}" in text
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert cells == [
        ["FAILS", "first", "cpu", "passed"],
        ["", "error", "`RuntimeError: broken \\| here` (status 1)", "**failed**"],
        ["WORKS", "first", "cpu", "passed"],
    ]
    assert "printed by works" in (stub / "gpu.log").read_text()
    assert main(["gpu", "--device", "cpu", "--quick", "--parts", "works"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "--device cpu is only for a rehearsal in small: add --quick"),
        (["--device", "cpu", "--quick", "--output", "no/where.md"], "--output no/where.md: not a file in a folder"),
        pytest.param(
            [],
            "finds no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_all_parts_end_within_eight_minutes() -> None:
    assert sum(part.seconds for part in gpu_parts.PARTS.values()) <= 8 * 60


def test_evaluation_and_loss_in_small(tmp_path: Path) -> None:
    setting = Setting("cpu", True, tmp_path)
    plain, reranked = gpu_checks.evaluation(setting)
    assert plain.passed and reranked.passed and "mAP differs by 0e+00" in plain.figure
    rows = list(gpu_speed.loss(setting))
    assert [row.measurement.split(",")[0] for row in rows] == ["N = 64", "N = 128"]
    assert all("DRSL (default) " in row.figure and "SupCon " in row.figure for row in rows)


def test_a_loss_that_does_not_fit_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_step = measure.make_step

    def full(name: str, *rest: object) -> object:
        if name == "SupCon":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return make_step(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "make_step", full)
    rows = list(gpu_speed.loss(Setting("cpu", True, tmp_path)))
    assert all(row.figure.endswith("SupCon does not fit") for row in rows)


def test_one_process_goes_through_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "_train", lambda *_, **__: Row("demo", "trained"))
    gathered = []
    all_gather = dist.all_gather

    def spy(*args: object, **kwargs: object) -> object:
        gathered.append(args)
        return all_gather(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(dist, "all_gather", spy)
    rows = list(gpu_checks.nccl(Setting("cpu", True, tmp_path)))
    assert len(rows) == 4 and all(row.passed for row in rows)
    assert gathered and not dist.is_initialized()


@pytest.mark.parametrize(("found", "passed"), [([1.0, 0.0], True), ([1.0, 0.1], False), ([float("nan"), 0.0], False)])
def test_a_wrong_result_fails(found: list[float], passed: bool) -> None:
    same, wanted = torch.ones(2), torch.tensor([1.0, 0.0])
    assert gpu_checks._agreement("name", [torch.tensor(found), same], [wanted, same]).passed == passed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_command_can_be_rehearsed(tmp_path: Path) -> None:
    pytest.importorskip("torchreid")
    assert main(["gpu", "--device", "cpu", "--quick", "--output", str(tmp_path / "gpu.md")]) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert all(part.title in text for part in gpu_parts.PARTS.values())
    assert "failed**" not in text


class TestOnCuda:
    pytestmark = on_cuda

    def test_waiting_operations_are_counted(self) -> None:
        x = torch.ones(4, device="cuda")
        assert gpu_speed._waits(lambda: None) == 0
        assert gpu_speed._waits(lambda: [x.sum().item(), x.max().item()]) == 2  # type: ignore[arg-type, return-value]

    def test_peak_memory_is_the_step_s_own(self) -> None:
        kept = torch.ones(2**22, device="cuda")
        largest = torch.ones(2**23, device="cuda")
        del largest
        assert measure.cuda_peak_bytes(lambda: kept + 1) == 2**24
