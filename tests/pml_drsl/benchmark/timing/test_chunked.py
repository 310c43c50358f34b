"""``drsl-benchmark speed --step --chunk``: what it runs, prints and writes; its times are for people to read."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pml_drsl.benchmark.__main__ import main
from pml_drsl.benchmark.timing import measure
from pml_drsl.benchmark.timing import step as speed_step
from pml_drsl.benchmark.timing.chunked import make_step


class TinyNetwork(nn.Module):
    """Returns scores and features, as a network of torchreid does, and keeps the sizes of the batches that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 2, 5)
        self.sizes: list[int] = []

    def forward(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
        self.sizes.append(len(images))
        return None, self.linear(images.flatten(1))


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[TinyNetwork]:
    """The tiny networks that the benchmark has built. They take images of 4 x 2 pixels."""
    built: list[TinyNetwork] = []

    def build(network: str, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        built.append(TinyNetwork())
        return built[-1], torch.optim.SGD(built[-1].parameters(), lr=1.0)

    monkeypatch.setattr(speed_step, "build", build)
    monkeypatch.setattr(speed_step, "HEIGHT", 4)
    monkeypatch.setattr(speed_step, "WIDTH", 2)
    return built


def found_in_processes(monkeypatch: pytest.MonkeyPatch, seconds: Mapping[tuple[int, int], float]) -> None:
    """Replaces the separate processes: steps have these seconds, by (size, chunk), and all other steps do not fit."""

    def probe(make: partial[Any], size: int, device: str, threads: int, memory: float, limit: Any) -> measure.Probe:
        way = size, make.args[1]
        return measure.Probe(seconds[way], 1000) if way in seconds else measure.Probe(failure="does not fit in 8 GiB")

    monkeypatch.setattr(measure, "probe", probe)


def rows_of(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    path = tmp_path / "rows.json"
    fixed = ["--step", "osnet_x0_25", "--device", "cpu", "--threads", "1", "--json", str(path)]
    assert main(["speed", *fixed, *options]) == 0
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def test_chunks_take_less_memory_than_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchreid")
    monkeypatch.setattr(speed_step, "HEIGHT", 64)
    monkeypatch.setattr(speed_step, "WIDTH", 32)
    files = ["--csv", str(tmp_path / "rows.csv")]
    rows = rows_of(tmp_path, "--chunk", "8", "--sizes", "64", "--seconds", "0.01", *files)
    assert [(row["network"], row["size"], row["chunk"]) for row in rows] == [("osnet_x0_25", 64, way) for way in (0, 8)]
    whole, chunks = rows
    # The graph is that of an eighth of the images.
    assert 0 < chunks["peak_bytes"] < whole["peak_bytes"] / 3
    # The whole batch keeps at least the output of the first convolution: 16 channels of half the height and width.
    assert whole["peak_bytes"] > 64 * 16 * 32 * 16 * 4
    assert whole["ratio"] == 1 and chunks["ratio"] > 0
    for row in rows:
        assert row["image_seconds"] == pytest.approx(row["seconds"] / 64) and row["seconds"] > 0
        assert (row["rounds"], row["plain_size"], row["note"]) == (1, 64, "timed once, cold")
    with open(tmp_path / "rows.csv", newline="") as file:
        assert [row["peak_bytes"] for row in csv.DictReader(file)] == [str(row["peak_bytes"]) for row in rows]
    out = capsys.readouterr().out
    assert "64 x 32 pixels" in out and "at most 8 images" in out


def test_both_ways_make_the_same_step(networks: list[TinyNetwork]) -> None:
    weights = []
    for chunk in (0, 3):
        torch.manual_seed(0)
        step = make_step("any", chunk, (4, 2), "cpu", 8)
        before = networks[-1].linear.weight.detach().clone()
        step()
        weights.append(networks[-1].linear.weight.detach())
        assert not torch.equal(weights[-1], before)
    torch.testing.assert_close(weights[1], weights[0])
    assert networks[0].sizes == [8]
    # Two passes, of chunks that differ by one image at most.
    assert networks[1].sizes == [3, 3, 2] * 2


def test_where_the_whole_batch_does_not_fit_the_largest_that_fits_is_compared(
    networks: list[TinyNetwork], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 1, 1.5, 2 and 2.5 seconds for each image of 8 and 16 images, and 1.5 for each of 64 images.
    seconds = {(8, 0): 8.0, (8, 4): 12.0, (16, 0): 32.0, (16, 4): 40.0, (64, 4): 96.0}
    found_in_processes(monkeypatch, seconds)
    rows = rows_of(tmp_path, "--chunk", "4", "--sizes", "64", "16", "8", "16")
    assert [(row["size"], row["chunk"]) for row in rows] == [(size, way) for size in (8, 16, 64) for way in (0, 4)]
    assert [row["ratio"] for row in rows] == [1, 1.5, 1, 1.25, None, 0.75]
    assert [row["plain_size"] for row in rows] == [8, 8, 16, 16, None, 16]
    assert [row["rounds"] for row in rows] == [1, 1, 1, 1, 0, 1]
    assert (rows[4]["note"], rows[4]["seconds"], rows[4]["peak_bytes"]) == ("does not fit in 8 GiB", None, None)
    assert rows[5]["note"] == "/ whole: against 16 images, the most that fit; timed once, cold"
    assert rows[5]["note"] in capsys.readouterr().out


def test_without_any_plain_step_there_is_no_ratio(
    networks: list[TinyNetwork], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found_in_processes(monkeypatch, {(8, 4): 0.001})
    whole, chunks = rows_of(tmp_path, "--chunk", "4", "--sizes", "8", "--seconds", "0.01")
    assert (whole["seconds"], whole["ratio"], chunks["ratio"], chunks["plain_size"]) == (None, None, None, None)
    assert chunks["seconds"] > 0 and chunks["rounds"] >= measure.FEWEST_ROUNDS


def test_ratios_are_taken_round_by_round(
    networks: list[TinyNetwork], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = {0: [1.0, 10.0, 2.0], 4: [2.0, 15.0, 6.0]}  # ratios 2, 1.5 and 3; of the medians, 3

    def take_turns(steps: Mapping[int, Callable[[], None]], seconds: float, device: str) -> dict[int, list[float]]:
        assert list(steps) == [0, 4]
        return times

    found_in_processes(monkeypatch, {(8, 0): 0.1, (8, 4): 0.1})
    monkeypatch.setattr(measure, "take_turns", take_turns)
    whole, chunks = rows_of(tmp_path, "--chunk", "4", "--sizes", "8")
    assert (whole["seconds"], whole["ratio"], chunks["seconds"], chunks["ratio"]) == (2, 1, 6, 2)
    assert (chunks["image_seconds"], chunks["rounds"], chunks["note"]) == (0.75, 3, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chunk", "4"], "--chunk 4 is for the training step of a network; give --step NETWORK too"),
        (["--step", "osnet_x0_25", "--chunk", "4", "--losses", "FastAP"], "--losses FastAP: --chunk compares"),
        (["--step", "osnet_x0_25", "--dims", "64"], "--dims 64: osnet_x0_25 has its own number of dimensions"),
        (["--step", "osnet_x0_25", "--chunk", "0"], "--chunk must be above 0, got 0"),
        (["--step", "osnet_x0_25", "--chunk", "-4"], "--chunk must be above 0, got -4"),
        (["--step", "osnet_x0_25", "--chunk", "4", "--memory", "0"], "--memory must be above 0, got 0.0"),
    ],
)
def test_bad_arguments_are_told(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_network_or_no_torchreid_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchreid")
    monkeypatch.setattr(measure, "probe", lambda *_: pytest.fail("it must be told before the work"))
    assert main(["speed", "--step", "osnet_x9", "--chunk", "4"]) == 2
    assert "--step osnet_x9: not a network of torchreid" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torchreid", None)
    assert main(["speed", "--step", "osnet_x0_25", "--chunk", "4"]) == 2
    assert "needs torchreid: pip install 'pml-drsl[reid]'" in capsys.readouterr().err
