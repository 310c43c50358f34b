"""drsl-extract gives drsl-evaluate what the run's own test scored, and one clear line for bad input."""

import json
import multiprocessing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import processes
import pytest
import torch
import trained
from PIL import Image

from torchreid_ext import get_default_config
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.cli import evaluate, extract
from torchreid_ext.evaluation import errors
from torchreid_ext.images import Row, Table
from torchreid_ext.pixels import read_image
from torchreid_ext.search.features import extract_files, extract_sets
from torchreid_ext.search.model import load_model

complaint = partial(trained.complaint, command="drsl-extract")
NECKED = {"model.bnneck": True, "test.dist_metric": "euclidean", "test.normalize_feature": True}


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="a new process knows no patch of this one")
def test_images_need_no_shared_memory(tmp_path, monkeypatch):
    """Docker gives 64 megabytes of it, which two batches fill."""
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", mock.Mock(side_effect=RuntimeError("/dev/shm is full")))
    for name in "ab":
        Image.new("RGB", (8, 16)).save(tmp_path / f"{name}.png")
    model = SimpleNamespace(config=get_default_config(), features=lambda images: images.flatten(1)[:, :4])
    rows = [Row(str(tmp_path / f"{name}.png")) for name in "ab"]
    assert extract_files(model, rows, batch_size=1, workers=1).features.shape == (2, 4)


@pytest.fixture(scope="module", params=[{}, NECKED], ids=["plain", "necked"])
def model(request, tmp_path_factory):
    return trained.train(tmp_path_factory.mktemp("run with spaces"), **request.param)


@pytest.fixture(scope="module")
def any_model(tmp_path_factory):
    return trained.train(tmp_path_factory.mktemp("any"))


@pytest.mark.parametrize("source", ["none", "csv"])
def test_the_scores_are_those_of_the_run(model, tmp_path, source, capsys):
    folder = model.parents[2]
    words = [] if source == "none" else [str(folder / "list.csv")]
    assert extract.main([str(model), *words, "--output", str(tmp_path / "f.npz"), "--workers", "1"]) == 0
    assert f"Scores: drsl-evaluate {tmp_path / 'f.npz'}\n" in capsys.readouterr().out
    assert evaluate.main([str(tmp_path / "f.npz"), "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    of_run = json.loads((folder / "log" / "metrics.json").read_text())["listed"]
    assert abs(scores["mAP"] - of_run["mAP"]) < 1e-9 and abs(scores["mINP"] - of_run["mINP"]) < 1e-9
    assert 0 < of_run["mAP"] < 1


def test_a_folder_of_unnamed_images(any_model, tmp_path, capsys):
    gallery = tmp_path / "gällery"
    gallery.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 32), (number * 80, 0, 0)).save(gallery / f"{number} ü.png")
    (gallery / "notes.txt").write_text("no image")
    # Options may stand before the sources.
    assert extract.main([str(any_model), "--output", str(tmp_path / "f.npz"), str(gallery)]) == 0
    out = capsys.readouterr().out
    assert "'notes.txt'" in out and "no scores" in out
    with np.load(tmp_path / "f.npz") as file:
        assert set(file) == {"gallery", "gallery_paths", "metric", "model_fingerprint"}
        assert file["gallery"].shape == (3, 512)
        assert file["gallery_paths"].tolist() == [str(gallery / f"{number} ü.png") for number in range(3)]
    assert evaluate.main([str(tmp_path / "f.npz")]) == 2


def test_damaged_images_stop_it_or_are_listed(any_model, tmp_path, capsys):
    for number in range(4):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (32, 16, 3), dtype=np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    bad = tmp_path / "1.png"
    bad.write_bytes(bad.read_bytes()[:300])
    words = [str(any_model), str(tmp_path), "--output", str(tmp_path / "f.npz"), "--batch-size", "2"]
    assert extract.main(words) == 2
    line = complaint(capsys)
    assert "1.png" in line and "--skip-damaged" in line and not list(tmp_path.glob("*.npz*"))
    assert extract.main([*words, "--skip-damaged"]) == 0
    assert capsys.readouterr().err.startswith("left out: cannot read image")
    with np.load(tmp_path / "f.npz") as file:
        assert [Path(path).name for path in file["gallery_paths"]] == ["0.png", "2.png", "3.png"]
        only = load_model(any_model, device="cpu")
        images = [extract_by_hand(only, tmp_path / f"{number}.png") for number in (0, 2, 3)]
        assert np.abs(file["gallery"] - torch.cat(images).numpy()).max() < 1e-5
    for number in (0, 2, 3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    (tmp_path / "f.npz").unlink()
    assert extract.main([*words, "--skip-damaged"]) == 2
    assert "none of the 4 images can be read" in complaint(capsys) and not list(tmp_path.glob("*.npz*"))


def test_a_file_that_cannot_be_opened_stops_it_in_any_case(any_model, tmp_path, capsys, monkeypatch):
    for number in range(3):
        Image.new("RGB", (16, 32), (number * 80, 0, 0)).save(tmp_path / f"{number}.png")
    real = open

    def refused(file, *more, **options):
        if str(file).endswith("1.png"):
            raise PermissionError(13, "Permission denied", file)
        return real(file, *more, **options)

    monkeypatch.setattr("builtins.open", refused)
    words = [str(any_model), str(tmp_path), "--output", str(tmp_path / "f.npz"), "--workers", "0"]
    for more in ([], ["--skip-damaged"]):
        assert extract.main([*words, *more]) == 2
        assert complaint(capsys) == f"drsl-extract: cannot read image '{tmp_path}/1.png': Permission denied"


def test_a_damaged_file_is_named_once(any_model, tmp_path, capsys):
    bad = tmp_path / "back\\slash\nline.png"
    bad.write_bytes(b"no image")
    assert extract.main([str(any_model), str(bad), "--output", str(tmp_path / "f.npz"), "--workers", "0"]) == 2
    assert complaint(capsys).count("slash") == 1


def test_an_image_that_is_query_and_gallery_is_read_once(any_model, tmp_path, capsys, monkeypatch):
    names = [f"{name}.png" for name in ("anna/hall_1", "anna/hall_2", "ben/hall_1", "carl/door_1")]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (32, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / names[3]).write_bytes(b"")
    read = []

    def counted(path):
        read.append(path)
        return read_image(path)

    monkeypatch.setattr("torchreid_ext.search.model.read_image", counted)
    words = [str(any_model), str(tmp_path), "--names", "folder", "--output", str(tmp_path / "f.npz"), "--skip-damaged"]
    words += ["--workers", "0", "--device", "cpu"]
    assert extract.main(words) == 0
    assert sorted(read) == [str(tmp_path / name) for name in names]
    assert capsys.readouterr().err.count("left out: ") == 1
    apart = extract_files(load_model(any_model, device="cpu"), [Row(str(tmp_path / name)) for name in names[:3]])
    with np.load(tmp_path / "f.npz") as file:
        for side, rows in (("gallery", [0, 1, 2]), ("query", [0, 2])):
            assert file[f"{side}_paths"].tolist() == [str(tmp_path / names[row]) for row in rows]
            assert np.array_equal(file[side], apart.features[rows].numpy())
    sides = ((3, "query"), (0, "query"), (0, "gallery"), (1, "gallery"))
    table = Table([Row(str(tmp_path / names[number]), split=side) for number, side in sides])
    sets = extract_sets(load_model(any_model, device="cpu"), table, skip_damaged=True)
    assert np.array_equal(sets["query"].features, apart.features[:1])  # without the damaged one, which is a query alone
    for row in (0, 2):
        (tmp_path / names[row]).write_bytes(b"")
    assert extract.main(words) == 2
    assert "none of the 3 query images can be read" in capsys.readouterr().err


def extract_by_hand(model, path):
    from torchvision import transforms

    steps = [transforms.Resize((32, 16)), transforms.ToTensor()]
    steps.append(transforms.Normalize([0.4, 0.5, 0.6], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        return model.network(transforms.Compose(steps)(Image.open(path).convert("RGB"))[None])


def test_several_processes_write_what_one_writes(any_model, tmp_path):
    listed = str(any_model.parents[2] / "list.csv")
    for number, name in enumerate(("one", "two"), 1):
        words = [any_model, listed, "--output", tmp_path / f"{name}.npz", "--workers", "0", "--device", "cpu"]
        printed = processes.like_torchrun(extract.main, (list(map(str, words)),), number, tmp_path / name)
    assert printed.count("features of 512 dimensions") == 1
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        assert set(one) == set(two) and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": "nowhere.pth"}, "nowhere.pth' does not exist: give a checkpoint, or the folder of a run"),
        ({"source": "nowhere", "checkpoint": "lost.pth"}, "'nowhere' does not exist"),  # before anything is loaded
        ({"output": "features.txt"}, "must end in .npz"),
        ({"more": ["--batch-size", "0"]}, "batch size 0"),
        ({"more": ["--config-file", "nowhere.yaml"]}, "nowhere.yaml"),
        ({"more": ["--root", "elsewhere"]}, "--root is for the test images of the run itself"),
    ],
)
def test_bad_input(any_model, tmp_path, capsys, changes, words):
    source = changes.get("source", str(any_model.parents[2] / "list.csv"))
    output = tmp_path / changes.get("output", "f.npz")
    command = [str(changes.get("checkpoint", any_model)), source, "--output", str(output), *changes.get("more", [])]
    assert extract.main(command) == 2
    assert words in complaint(capsys) and not list(tmp_path.iterdir())


def test_the_checkpoint_is_not_overwritten(any_model, tmp_path, capsys):
    own = tmp_path / "checkpoint.npz"
    own.write_bytes(any_model.read_bytes())
    assert extract.main([str(own), str(any_model.parents[2] / "list.csv"), "--output", str(own)]) == 2
    assert "would overwrite" in complaint(capsys) and own.read_bytes() == any_model.read_bytes()


def test_a_checkpoint_without_a_configuration(any_model, tmp_path, capsys):
    state = checkpoint.load(any_model)
    state["training"]["config"] = {}
    checkpoint.save(state, tmp_path / "bare.pth")
    words = [str(tmp_path / "bare.pth"), str(any_model.parents[2] / "list.csv"), "--output", str(tmp_path / "f.npz")]
    assert extract.main(words) == 2
    assert "--config-file" in complaint(capsys)
    assert extract.main([words[0], *words[2:], "--model", "osnet_x0_25"]) == 2
    assert "have no run, and so no test images: give a SOURCE" in complaint(capsys)
    assert extract.main([*words, "--config-file", str(any_model.parents[1] / "config.yaml")]) == 0


def test_the_test_images_of_own_photos_have_their_names(any_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(errors, "_drawn", lambda *given: "")  # Figures take seconds.
    for name in ("3", "7", "10", "anna", "ben", "carl"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number, file in enumerate(("IMG_1.png", "PXL_1.png")):
            Image.new("RGB", (16, 32), (number * 80, len(name), 0)).save(tmp_path / "photos" / name / file)
    state = checkpoint.load(any_model)
    config = {"datasets.mine.folder": "photos", "data.sources": ["mine"], "data.targets": ["mine"]}
    state["training"]["config"] |= config | {"data.root": str(tmp_path)}
    commands = (extract.main, ["--output", str(tmp_path / "f.npz")]), (evaluate.main, ["--errors"])
    for people_ in (["mine/3", "mine/anna", "mine/ben", "mine/7", "mine/10", "mine/carl"], []):
        state["training"]["people"] = people_
        checkpoint.save(state, tmp_path / "run.pth")
        for main, words in commands:
            capsys.readouterr()
            assert main([str(tmp_path / "run.pth"), *words]) == (2 if people_ else 0)
            if people_:
                assert "3 people of this test, such as" in capsys.readouterr().err
    with np.load(tmp_path / "f.npz") as file:
        people = [Path(path).parent.name for path in file["gallery_paths"]]
        assert file["gallery_ids"].tolist() == people and set(file["gallery_cams"].tolist()) == {"IMG", "PXL"}
    page = (tmp_path / "errors.html").read_text(encoding="utf-8")
    assert people[0] in page and '<th scope="row">PXL</th>' in page


def test_cameras_in_names_are_said_and_can_be_left_out(any_model, tmp_path, capsys):
    for name in ("IMG_1", "IMG_2", "PXL_3"):
        (tmp_path / "anna").mkdir(exist_ok=True)
        Image.new("RGB", (16, 32), (len(name), 0, 0)).save(tmp_path / "anna" / f"{name}.png")
    words = [str(any_model), str(tmp_path), "--names", "folder", "--output", str(tmp_path / "f.npz")]
    for more, said, arrays in (([], True, True), (["--no-cameras"], False, False)):
        assert extract.main([*words, *more]) == 0
        assert ("Cameras: IMG, PXL\n" in capsys.readouterr().out) == said
        with np.load(tmp_path / "f.npz") as file:
            assert ("query_cams" in file) == arrays and len(file["query"]) == (2 if arrays else 3)
    for option in (["--no-cameras"], ["--names", "folder"]):
        assert extract.main([words[0], *words[4:], *option]) == 2
        assert f"{option[0]} is for a SOURCE" in complaint(capsys)
    (tmp_path / "ben").mkdir()
    (tmp_path / "anna" / "PXL_3.png").rename(tmp_path / "ben" / "PXL_3.png")
    assert extract.main(words) == 0  # Images of a query's person and camera are left out, and so all matches.
    out = capsys.readouterr().out
    assert "Cameras: IMG, PXL\n" in out and "Scores:" not in out and "no scores to compute" in out
    assert evaluate.main([words[-1]]) == 2
    assert "give the same command with --no-cameras\n" in out and extract.main([*words, "--no-cameras"]) == 0
    assert "Scores:" in capsys.readouterr().out and evaluate.main([words[-1]]) == 0


def test_what_keeps_scores_from_being_computed_is_named(any_model, tmp_path, capsys):
    for name in ("anna/1.png", "ben/1.png", "group.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 32)).save(tmp_path / name)
    for source, why in (
        (
            tmp_path,
            f"no identity is known for 1 of 3 images, the first being {str(tmp_path / 'group.png')!r}: leave them "
            "out, or say with --names who they are, by their paths below the folder that is given\n",
        ),
        (tmp_path / "anna" / "1.png", "that needs query and gallery images\n"),
    ):
        words = [str(any_model), str(source), "--names", "folder", "--output", str(tmp_path / "f.npz")]
        assert extract.main(words) == 0
        assert f"There are no scores to compute: {why}" in capsys.readouterr().out
    (tmp_path / "group.png").unlink()  # Now every person has one image, which --no-cameras cannot help.
    for more in ([], ["--no-cameras"]):
        assert extract.main([words[0], str(tmp_path), *words[2:], *more]) == 0
        assert "There are no scores to compute: that needs a second image of a person\n" in capsys.readouterr().out
    assert evaluate.main([words[-1]]) == 2 and "add other images of its identity" in capsys.readouterr().err
