"""The examples run, on small data, and show what they say."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trained
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example in this process and returns what it prints."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A checkpoint, and a folder of photos PERSON/*.png beside its run."""
    folder = tmp_path_factory.mktemp("examples")
    checkpoint = trained.train(folder, **trained.SMALL)
    for path in (folder / "images").iterdir():
        person, name = path.name.split("_", 1)
        (folder / "photos" / person).mkdir(parents=True, exist_ok=True)
        Image.open(path).save(folder / "photos" / person / name)
    (folder / "photos" / "2a").mkdir()  # An empty folder is nobody's.
    return checkpoint, folder / "photos"


def test_pml_loop(run, network):
    output = run("pml_loop.py", network[1], "--epochs", 3, "--size", 32)
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", output)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_torchreid_script(run, network, tmp_path):
    output = run("torchreid_script.py", network[1], "--epochs", 1, "--batch-size", 16, "--save-dir", tmp_path / "log")
    assert re.search(r"^mAP [\d.]+%$", output, re.M)
    assert list((tmp_path / "log").rglob("*.pth.tar*"))


def test_large_batch(run):
    output = run("large_batch.py", "--batch-size", 64, "--chunk-size", 16)
    in_chunks, from_small = map(float, re.search(r"in chunks (\S+), from small batches (\S+)", output).groups())
    assert in_chunks < 1e-4 < 0.1 < from_small


def test_onnx_search_finds_what_the_network_finds_without_torch(network, tmp_path):
    from torchreid_ext import Searcher
    from torchreid_ext.cli.export import main

    checkpoint, photos = network
    model, query = tmp_path / "model.onnx", photos / "7" / "0_1.png"
    assert main([str(checkpoint), str(model)]) == 0
    photos = Path(shutil.copytree(photos, tmp_path / "photos"))
    photo = np.asarray(Image.open(query))
    Image.fromarray(np.dstack([photo, photo[..., 0]])).save(photos / "7" / "transparent.png")
    Image.fromarray(257 * photo[..., 0].astype(np.uint16)).save(photos / "7" / "16 bits.png")
    everything = sorted(photos.rglob("*.png"))
    program = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__'); assert 'torch' not in sys.modules"
    program = f"import sys; del sys.argv[0]; {program}"
    words = [EXAMPLES / "onnx_search.py", model, photos, query, "--top", str(len(everything))]
    command = [sys.executable, "-c", program, *words]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    searcher = Searcher(checkpoint, device="cpu")
    searcher.add(everything)
    expected = searcher.search(query, top=len(everything))[0]
    rows = [line.split("  ") for line in output.splitlines()]
    assert [Path(path).parts[-2:] for _, _, path in rows] == [Path(match.name).parts[-2:] for match in expected]
    assert [float(distance) for _, distance, _ in rows] == pytest.approx(
        [match.distance for match in expected], abs=2e-4
    )


def test_wildlife(monkeypatch, capsys):
    import torch
    from sklearn.metrics import average_precision_score

    monkeypatch.setattr(sys, "argv", ["wildlife.py", "--steps", "60"])
    names = runpy.run_path(str(EXAMPLES / "wildlife.py"))
    before, after = (float(value) for value in re.findall(r"mAP ([\d.]+)%", capsys.readouterr().out))
    assert after > before + 5
    labels = names["labels"][~names["train_set"]]
    with torch.no_grad():
        x = torch.nn.functional.normalize(names["model"].eval()(names["images"][~names["train_set"]]))
    others = ~torch.eye(len(x), dtype=torch.bool)
    each = [average_precision_score(labels[o] == labels[q], x[o] @ x[q]) for q, o in enumerate(others)]
    assert after == pytest.approx(100 * sum(each) / len(each), abs=0.06)


def test_the_figure_of_the_bound_is_that_of_the_loss(run, tmp_path, monkeypatch):
    import torch

    from pml_drsl import DRSLoss

    monkeypatch.setattr(sys, "argv", ["bound_figure.py", str(tmp_path / "bound.svg")])
    names = runpy.run_path(str(EXAMPLES / "bound_figure.py"))
    assert "<svg" in (tmp_path / "bound.svg").read_text()
    for cosines in ([0.5, 0.4], [0.1, 0.3]):
        others = torch.tensor([[c, (1 - c * c) ** 0.5] for c in cosines])
        loss = DRSLoss(sort_weight=0, bound_power=0.3)(
            torch.tensor([[1.0, 0.0]]), torch.tensor([0]), ref_emb=others, ref_labels=torch.tensor([0, 1])
        )
        assert loss.item() == pytest.approx(names["bound"](cosines[1] - cosines[0], 0.05, 0.3), rel=1e-4)


def test_the_notebook(capsys):
    import matplotlib

    matplotlib.use("agg")
    cells = json.loads((EXAMPLES / "drsl.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells), "outputs are not committed"
    names = {"__name__": "__main__"}
    for source in sources:
        exec(source, names)
    pixels, network = map(
        float, re.search(r"pixels ([\d.]+)%, of the network ([\d.]+)%", capsys.readouterr().out).groups()
    )
    assert network > pixels + 5
    assert names["errors"][-1] < names["errors"][0]
