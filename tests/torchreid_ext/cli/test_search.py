"""drsl-search finds, keeps an index, overwrites no input, and refuses bad input in one line."""

import io
import json
import os
import re
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import trained
from PIL import Image

from pml_drsl import console
from torchreid_ext import Searcher
from torchreid_ext.cli import extract, search
from torchreid_ext.images import Row
from torchreid_ext.runtime.files import locked
from torchreid_ext.search import features
from torchreid_ext.search.searcher import Match, as_text, rankings

complaint = partial(trained.complaint, command="drsl-search")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trained.train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def photos(model, tmp_path_factory):
    """A gallery of six people in folders, with names that are no ASCII and spaces."""
    folder = tmp_path_factory.mktemp("my photos") / "gällery"
    for path in sorted((model.parents[2] / "images").glob("*.png")):
        pid, camera, shot = path.stem.split("_")
        if int(pid) < 6:
            (folder / f"pérson {pid}").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"pérson {pid}" / f"cam{camera}_<{shot}>&.png")
    return folder


def run(*words):
    return search.main([*map(str, words), "--workers", "0", "--device", "cpu", "--names", "folder"])


def test_text_json_and_python_agree(model, photos, tmp_path, capsys):
    query = photos / "pérson 2" / "cam0_<1>&.png"
    # The photos below a folder of one person have an identity by the folder above it alone.
    both = ["--gallery", photos, photos / "pérson 2"]
    assert run(model, *both, "--query", query, "--top", 3, "--json", tmp_path / "r.json") == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    (asked,) = found["queries"]
    assert found["gallery"] == 24 and found["metric"] == "cosine"
    assert asked["path"] == str(query) and (asked["identity"], asked["camera"]) == ("pérson 2", "cam0")
    searcher = Searcher(model.parents[1], device="cpu", names="folder")
    searcher.add(sorted(map(str, photos.rglob("*.png"))))
    own, *expected = searcher.search(query, top=4)[0]
    assert own.name == str(query) and [match["rank"] for match in asked["matches"]] == [1, 2, 3]
    for match, other in zip(asked["matches"], expected, strict=True):
        assert match["same_identity"] == ("pérson 2" in match["path"])
        assert match["path"] == other.name and abs(match["distance"] - other.distance) < 1e-5
        assert re.search(rf"{match['rank']} .*{match['distance']:.4f}.*camera {match['camera']}", out)
    assert run(model, "--gallery", photos, "--query", query, "--top", 3, "--json", "-") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == found and printed.out.isascii() and "pérson 2" in printed.err
    # A run's folder stands for its checkpoint, image files for their folder, and folders for several queries.
    several = ["--gallery", *sorted(photos.rglob("*.png")), "--query", photos / "pérson 2", "--top", 3]
    assert run(model.parents[1], *several, "--json", "-") == 0
    again = json.loads(capsys.readouterr().out)
    assert len(again["queries"]) == 4 and again["gallery"] == 24
    row = next(row for row in again["queries"] if row["path"] == str(query))
    assert row["identity"] == "pérson 2" and [match["path"] for match in row["matches"]] == [
        match["path"] for match in asked["matches"]
    ]


def test_weights_of_the_zoo_are_searched_with_before_any_training(model, photos, tmp_path, capsys):
    torch.save(torch.load(model, weights_only=True)["state_dict"], tmp_path / "zoo.pth")
    query = photos / "pérson 2" / "cam0_<1>&.png"
    words = [tmp_path / "zoo.pth", "--model", "osnet_x0_25", "--gallery", photos, "--query", query]
    assert run(*words) == 0
    printed = capsys.readouterr()
    assert "osnet_x0_25 with images of 256 x 128 pixels" in printed.err
    assert re.search(r" 1  0\.\d{4} +(same|other)", printed.out)
    assert run(words[0], *words[3:]) == 2
    assert "--model NAME" in complaint(capsys)


def test_a_part_of_a_larger_picture(model, photos, tmp_path):
    query = photos / "pérson 3" / "cam1_<0>&.png"
    street = Image.new("RGB", (200, 150), (40, 90, 40))
    with Image.open(query) as picture:
        street.paste(picture, (120, 30))
    street.save(tmp_path / "street.png")
    words = [model, "--gallery", photos, "--query", tmp_path / "street.png", "--json", tmp_path / "r.json"]
    assert run(*words, "--crop", 120, 30, 136, 62, "--html", tmp_path / "p.html") == 0
    (asked,) = json.loads((tmp_path / "r.json").read_text())["queries"]
    assert asked["crop"] == [120, 30, 136, 62]
    assert asked["matches"][0]["path"] == str(query) and asked["matches"][0]["distance"] < 1e-6
    assert run(*words) == 0
    assert json.loads((tmp_path / "r.json").read_text())["queries"][0]["matches"][0]["distance"] > 1e-4


def test_a_query_is_marked_where_the_gallery_or_its_own_name_says_whom_it_shows(model, photos, tmp_path, monkeypatch):
    inside = photos / "pérson 2" / "cam0_<1>&.png"
    shutil.copy(inside, tmp_path / "street.png")
    monkeypatch.chdir(tmp_path)
    words = ["--query", "street.png", inside, "--index", "index", "--top", 1, "--json", "r.json"]
    for gallery in (["--gallery", photos], []):
        assert run(model, *gallery, *words) == 0
        street, known = json.loads(Path("r.json").read_text())["queries"]
        assert street["identity"] == "" and street["matches"][0]["same_identity"] is None
        assert known["identity"] == "pérson 2" and known["matches"][0]["same_identity"] is not None
        # A copy of the photo is found, and the photo itself is not.
        assert (street["matches"][0]["path"], street["path"]) == (str(inside), str(Path("street.png").absolute()))
        assert known["matches"][0]["path"] != str(inside)


def test_features_of_drsl_extract_are_a_gallery(model, photos, tmp_path, capsys):
    query = photos / "pérson 2" / "cam0_<1>&.png"
    assert extract.main([str(model), str(photos), "--output", str(tmp_path / "f.npz"), "--device", "cpu"]) == 0
    for name, gallery in (("folder", photos), ("file", tmp_path / "f.npz")):
        words = ["--query", query, "--json", tmp_path / f"{name}.json", "--rerank"]
        assert run(model, "--gallery", gallery, *words) == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("folder", "file"))
    assert first["reranked"] and [m["path"] for m in first["queries"][0]["matches"]] == [
        m["path"] for m in second["queries"][0]["matches"]
    ]
    state = torch.load(model, weights_only=True)
    state["state_dict"]["conv1.conv.weight"] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    capsys.readouterr()
    assert run(tmp_path / "other.pth", "--gallery", tmp_path / "f.npz", "--query", query) == 2
    assert "features of another model" in complaint(capsys)


def test_an_index_is_made_searched_added_to_and_removed_from(model, photos, tmp_path, capsys, monkeypatch):
    index, query = tmp_path / "an index", photos / "pérson 2" / "cam0_<1>&.png"
    assert run(model, "--gallery", photos / "pérson 1", "--index", index) == 0
    assert "The index of 4 images" in capsys.readouterr().out
    assert run(model, "--gallery", photos, "--index", index, "--query", query, "--json", "-") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["gallery"] == 24 and "The index of 24 images" in printed.err
    before = index.read_bytes()
    assert run(model, "--index", index, "--gallery", photos, "--query", query, "--json", "-") == 0
    matches = json.loads(capsys.readouterr().out)["queries"][0]["matches"]
    assert len(matches) == 10 and str(query) not in {match["path"] for match in matches}
    assert index.read_bytes() == before  # nothing was new, so nothing was written
    assert run(model, "--index", index, "--remove", "*/pérson 2/*") == 0
    assert "Removed 4 images" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # It may stand where nothing can be written.
        patch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        assert run(model, "--index", index, "--query", query, "--json", "-") == 0
    assert "pérson 2" not in {m["identity"] for m in json.loads(capsys.readouterr().out)["queries"][0]["matches"]}
    # What is printed can be removed, and what is gone is pruned.
    assert run(model, "--index", index, "--query", query, "--top", 1) == 0
    printed = capsys.readouterr().out.splitlines()[-1].split("  ")[-1]
    copied = shutil.copy(printed, tmp_path / "copy.png")
    assert run(model, "--index", index, "--remove", printed, "--gallery", copied) == 0
    Path(copied).unlink()
    assert run(model, "--index", index, "--prune") == 0
    out = capsys.readouterr().out
    assert "Removed 1 images from the index\n" in out and "Removed 1 images from the index, whose files" in out
    assert run(model, "--index", index, "--remove", "*pérson*") == 2
    assert "matches all 19 images" in complaint(capsys)
    index.write_bytes(before[: len(before) // 2])
    assert run(model, "--index", index, "--query", query) == 2
    assert "damaged" in complaint(capsys)


def test_an_index_whose_photos_are_not_there_is_not_emptied(model, photos, tmp_path, capsys):
    index, disk = tmp_path / "index", tmp_path / "disk"
    shutil.copytree(photos / "pérson 1", disk)
    assert run(model, "--gallery", disk, "--index", index) == 0
    before = index.read_bytes()
    disk.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert run(model, "--index", index, "--prune") == 2
    assert "the files of all 4 images are gone" in complaint(capsys) and index.read_bytes() == before


@pytest.mark.parametrize("damaged", [3, 4])
def test_a_damaged_image_loses_only_its_part_of_the_index(model, photos, tmp_path, capsys, monkeypatch, damaged):
    """Four images and a damaged one, in parts of two: in the same part as another image, or alone in the last part."""
    gallery, index = tmp_path / "gallery", tmp_path / "index"
    shutil.copytree(photos / "pérson 1", gallery)
    for number, path in enumerate(sorted(gallery.iterdir())):
        path.rename(gallery / f"{number + (number >= damaged)}.png")
    (gallery / f"{damaged}.png").write_text("no image")
    monkeypatch.setattr(search, "PART", 2)
    words = [model, "--gallery", gallery, "--index", index]
    assert run(*words) == 2
    assert f"{damaged}.png" in complaint(capsys)
    kept = [entry.path for entry in Searcher(model, index=index, device="cpu").gallery.entries]
    assert kept == [str(gallery / f"{number}.png") for number in range(2 * (damaged // 2))]
    read, extract_files = [], features.extract_files

    def counted(trained, entries, **options):
        read.extend(entry.path for entry in entries)
        return extract_files(trained, entries, **options)

    monkeypatch.setattr(features, "extract_files", counted)
    assert run(*words, "--skip-damaged") == 0
    printed = capsys.readouterr()
    assert f"gallery/{damaged}.png': it is not an image" in printed.err and "The index of 4 images" in printed.out
    assert read == [str(gallery / f"{number}.png") for number in range(2 * (damaged // 2), 5)]
    # What is reported as removed is removed, though the damaged image ends the command.
    (gallery / "1.png").unlink()
    again = ["--gallery", gallery / f"{damaged}.png", "--remove", gallery / "0.png", "--prune"]
    assert run(model, "--index", index, *again) == 2
    out = capsys.readouterr().out
    assert "Removed 1 images from the index\n" in out and "Removed 1 images from the index, whose files" in out
    kept = [entry.path for entry in Searcher(model, index=index, device="cpu").gallery.entries]
    assert kept == [str(gallery / f"{number}.png") for number in (2, 7 - damaged)]


def test_a_query_that_is_left_out_is_named(model, photos, tmp_path, capsys):
    queries = tmp_path / "queries"
    shutil.copytree(photos / "pérson 2", queries)
    (queries / "damaged.png").write_text("no image")
    words = [model, "--gallery", photos, "--query", queries, "--json", "-"]
    assert run(*words) == 2
    assert "--skip-damaged" in complaint(capsys)
    (queries / "film.mp4").write_text("no image")
    assert run(*words, "--skip-damaged") == 0
    printed = capsys.readouterr()
    asked = [Path(query["path"]).name for query in json.loads(printed.out)["queries"]]
    assert asked == sorted(path.name for path in (photos / "pérson 2").iterdir())
    assert "left out: cannot read image" in printed.err and "damaged.png" in printed.err
    assert "queries left out: files of kinds that are not read (1: 'film.mp4')\n" in printed.err


def test_what_only_a_search_takes_is_refused_without_a_query(model, photos, tmp_path, capsys):
    making = [model, "--gallery", photos, "--index", tmp_path / "index"]
    page, text = ["--html", tmp_path / "p.html"], ["--json", tmp_path / "r.json"]
    for words in (page, text, ["--crop", 0, 0, 1, 1], ["--rerank"], ["--host", "0.0.0.0"]):
        assert run(*making, *words) == 2
        assert f"{words[0]} is " in complaint(capsys) and not list(tmp_path.iterdir())
    (tmp_path / "index").write_text("an index")
    assert run(model, "--index", tmp_path / "index") == 2
    assert "nothing to do" in complaint(capsys)


def test_a_second_writer_waits_and_says_so(model, photos, tmp_path, monkeypatch):
    index, said, status = tmp_path / "index", io.StringIO(), []
    monkeypatch.setattr("sys.stderr", said)
    words = model, "--index", index, "--gallery", photos / "pérson 1"
    writer = threading.Thread(target=lambda: status.append(run(*words)))
    with locked(index):
        writer.start()
        while writer.is_alive() and "waiting" not in said.getvalue():
            time.sleep(0.05)
        assert "waiting" in said.getvalue() and str(index) in said.getvalue() and not index.exists()
        assert run_locked(model, photos / "pérson 2", index) == 4
    writer.join(100)
    assert status == [0], said.getvalue()
    assert len(Searcher(model, index=index, device="cpu")) == 8


def run_locked(model, folder, index):
    searcher = Searcher(model, device="cpu", names="folder")
    searcher.add(sorted(map(str, folder.iterdir())))
    searcher.gallery.save(index)
    return len(searcher)


def test_an_interrupted_search_says_what_it_has_written(model, photos, tmp_path, monkeypatch, capsys):
    words = [model, "--gallery", photos / "pérson 1", "--query", photos / "pérson 1" / "cam0_<1>&.png"]
    index, page = str(tmp_path / "index"), str(tmp_path / "p.html")
    words += ["--index", index, "--html", page]

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchreid_ext.search.searcher.as_text", interrupt)
    assert run(*words) == 130
    assert capsys.readouterr().err.endswith(f"interrupted; written before that: {index!r}, {page!r}\n")
    assert run(*words) == 130  # the index had all images and was not written again
    assert capsys.readouterr().err == f"drsl-search: interrupted; written before that: {page!r}\n"


def test_a_name_that_is_no_utf8_goes_everywhere(model, photos, tmp_path, capsys):
    strange = os.fsdecode(b"caf\xe9\x1b[2J.png")
    shutil.copy(photos / "pérson 2" / "cam0_<1>&.png", tmp_path / strange)
    assert extract.main([str(model), str(tmp_path), "--output", str(tmp_path / "f.npz"), "--device", "cpu"]) == 0
    (tmp_path / "queries").mkdir()
    query = shutil.copy(tmp_path / strange, tmp_path / "queries")
    words = ["--query", query, "--json", tmp_path / "r.json", "--html", tmp_path / "p.html"]
    assert run(model, "--gallery", tmp_path / "f.npz", "--index", tmp_path / "index", *words) == 0
    assert run(model, "--index", tmp_path / "index", *words) == 0
    out = capsys.readouterr().out
    assert r"caf\udce9\x1b[2J.png" in out and "\x1b" not in out
    (asked,) = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["queries"]
    assert asked["matches"][0]["path"] == str(tmp_path / strange) and asked["matches"][0]["distance"] < 1e-6
    assert r"caf\udce9" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_nothing_that_is_read_is_overwritten(model, photos, tmp_path, capsys):
    gallery = tmp_path / "gallery"
    shutil.copytree(photos / "pérson 1", gallery)
    picture, query = next(gallery.iterdir()), shutil.copy(photos / "pérson 2" / "cam0_<1>&.png", tmp_path / "q.png")
    own = shutil.copy(model, tmp_path / "checkpoint.pth")
    (tmp_path / "link").symlink_to(picture)
    assert run(model, "--index", tmp_path / "index", "--gallery", gallery) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    both, image = ["--gallery", gallery, "--query", query], "has the name of an image"
    for words, message in (
        ([*both, "--html", query], "would overwrite"),
        ([*both, "--json", own], "would overwrite"),
        ([*both, "--html", picture], image),
        ([*both, "--json", tmp_path / "link"], image),
        ([*both, "--html", tmp_path / "new.JPG"], image),
        ([*both, "--index", query], "would overwrite"),
        ([*both, "--json", tmp_path / "new", "--html", tmp_path / "new"], "would overwrite"),
        (["--index", tmp_path / "index", "--query", query, "--json", tmp_path / "index"], "would overwrite"),
        (["--index", tmp_path / "index", "--query", query, "--html", picture], image),
    ):
        assert run(own, *words) == 2
        assert message in complaint(capsys)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_ordinary_photos_get_no_marks_and_names_no_power_over_the_terminal(capsys):
    evil = "photos/\x1b[31m\u202egnp.\n.png"
    query, match = Row("a.png", "", ""), Match(1, evil, -1e-9, "an\nna", "")
    (row,) = rankings([query], None, [[match]])
    assert row.matches[0].mark == "" and "-0.0000" not in as_text([row]) and "other" not in as_text([row])
    assert [row.matches[0].mark for row in rankings([Row("a", "an\nna")] * 2, None, [[match], []]) if row.matches] == [
        "right"
    ]
    console.say(as_text([row]))
    out = capsys.readouterr().out
    assert not any(sign in out for sign in "\x1b\u202e") and "\\x1b[31m\\u202egnp.\\n.png" in out
    assert "identity an\\nna  photos" in out


def test_two_galleries_with_the_same_names_are_told_apart_by_their_paths(model, photos, tmp_path, capsys):
    for name in ("north", "south"):
        shutil.copytree(photos / "pérson 1", tmp_path / name / "1")
    words = ["--gallery", tmp_path / "north", tmp_path / "south", "--top", 3, "--json", "-"]
    assert run(model, *words, "--query", tmp_path / "north" / "1" / "cam0_<0>&.png") == 0
    matches = json.loads(capsys.readouterr().out)["queries"][0]["matches"]
    assert {match["path"].split(os.sep)[-3] for match in matches} == {"north", "south"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--query", "Q", "--model", "osnet_x0_25"], "no run, and so no test images: give --gallery FOLDER"),
        (["--query", "Q", "--root", "EMPTY"], "list.csv: set data.root (--root) or datasets.listed.csv"),
        (["--query", "Q", "--root", "EMPTY", "--gallery", "G"], "leave it out beside --gallery and --index"),
        (["--gallery", "G"], "nothing to do"),
        (["--gallery", "G", "--query", "mee.jpg", "--skip-damaged"], "'mee.jpg' does not exist: give an image, a"),
        (["--gallery", "EMPTY", "--query", "Q"], "no image below"),
        (["--gallery", "G", "--query", "BOMB"], "too large"),
        (["--gallery", "G", "--query", "TEXT"], "it is not an image"),
        (["--gallery", "G", "--query", "Q", "--crop", "0", "0", "99", "5"], "cam0_<1>&.png': crop 0 0 99 5"),
        (["--gallery", "G", "--query", "Q", "--top", "0"], "--top 0"),
        (["--gallery", "G", "--query", "Q", "--html", "nowhere/p.html"], "--html nowhere/p.html"),
        (["--gallery", "G", "--query", "Q", "--prune"], "give --index"),
        (["--gallery", "TEXTS", "--query", "Q"], " or remove it; --skip-damaged leaves such images out"),
        (["--gallery", "G", "--query", "Q", "--remove", "x"], "give --index"),
    ],
)
def test_bad_input(model, photos, tmp_path, capsys, monkeypatch, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    for path in (tmp_path / "text.png", tmp_path / "texts" / "1.png"):
        path.write_text("no image")
    Image.new("L", (3000, 3000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    names = {
        "G": photos, "Q": photos / "pérson 2" / "cam0_<1>&.png", "EMPTY": tmp_path / "empty",
        "BOMB": tmp_path / "bomb.png", "TEXT": tmp_path / "text.png", "TEXTS": tmp_path / "texts",
    }  # fmt: skip
    output = tmp_path / "out"
    output.mkdir()
    outputs = ["--json", output / "r.json"] if "--html" in words else ["--html", output / "p.html"]
    words = [names.get(word, word) for word in words]
    assert search.main([*map(str, [model, *words, *outputs]), "--workers", "0", "--device", "cpu"]) == 2
    assert message in complaint(capsys) and not list(output.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gallery", "nowhere"], "'nowhere' does not exist: give an image, a folder of images, or a CSV file"),
        (["--gallery", "nowhere.npz"], "'nowhere.npz' does not exist"),
        (["--gallery", ".", "--names", "foldr"], "--names 'foldr' is unknown; the nearest is 'folder'"),
        (["--index", "."], "no gallery to search: give --gallery FOLDER; the index '.' is a folder"),
        (["--gallery", "."], "checkpoint 'lost.pth' does not exist: give a checkpoint, or the folder of a run"),
    ],
)
def test_a_mistyped_word_is_refused_before_a_network_is_loaded(capsys, monkeypatch, words, message):
    monkeypatch.setattr("torchreid_ext.search.searcher.load_model", None)
    assert search.main(["lost.pth", *words, "--query", "."]) == 2
    assert message in complaint(capsys)
