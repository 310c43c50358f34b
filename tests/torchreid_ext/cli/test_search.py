"""drsl-search finds, writes a page that is whole in itself, keeps an index, and refuses bad input in one line."""

import html.parser
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
import trained
from PIL import Image

from torchreid_ext import Searcher
from torchreid_ext.cli import extract, search
from torchreid_ext.search import page
from torchreid_ext.search.results import Ranked
from torchreid_ext.search.searcher import Match
from torchreid_ext.search.sources import Entry

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
    return search.main([*map(str, words), "--workers", "0", "--device", "cpu"])


def complaint(capsys):
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line]
    assert "Traceback" not in err and len(lines) == 1 and lines[0].startswith("drsl-search: "), err
    return lines[0]


def test_text_json_and_python_agree(model, photos, tmp_path, capsys):
    query = photos / "pérson 2" / "cam0_<1>&.png"
    assert run(model, "--gallery", photos, "--query", query, "--top", 3, "--json", tmp_path / "r.json") == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    (asked,) = found["queries"]
    assert found["gallery"] == 24 and found["metric"] == "cosine" and found["recall"] is None
    assert asked["path"] == str(query) and (asked["identity"], asked["camera"]) == ("pérson 2", "cam0")
    searcher = Searcher(model, device="cpu")
    searcher.add(sorted(map(str, photos.rglob("*.png"))))
    expected = searcher.search(query, top=3)[0]
    assert asked["matches"][0]["path"] == str(query) and asked["matches"][0]["same_identity"] is True
    for match, other in zip(asked["matches"], expected, strict=True):
        assert match["path"] == other.name and abs(match["distance"] - other.distance) < 1e-5
        assert re.search(rf"{match['rank']} .*{match['distance']:.4f}.*camera {match['camera']}", out)
    assert run(model, "--gallery", photos, "--query", query, "--top", 3, "--json", "-") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == found and "pérson 2" in printed.err


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


def test_an_index_is_made_searched_added_to_and_removed_from(model, photos, tmp_path, capsys):
    index, query = tmp_path / "an index", photos / "pérson 2" / "cam0_<1>&.png"
    assert run(model, "--gallery", photos / "pérson 1", "--index", index) == 0
    assert "The index of 4 images" in capsys.readouterr().out
    assert run(model, "--gallery", photos, "--index", index, "--query", query, "--json", "-") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["gallery"] == 24 and "The index of 24 images" in printed.err
    before = index.read_bytes()
    assert run(model, "--index", index, "--gallery", photos, "--query", query, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["queries"][0]["matches"][0]["path"] == str(query)
    assert index.read_bytes() == before  # nothing was new, so nothing was written
    assert run(model, "--index", index, "--remove", "*/pérson 2/*") == 0
    assert "Removed 4 images" in capsys.readouterr().out
    assert run(model, "--index", index, "--query", query, "--json", "-") == 0
    assert "pérson 2" not in {m["identity"] for m in json.loads(capsys.readouterr().out)["queries"][0]["matches"]}
    index.write_bytes(before[: len(before) // 2])
    assert run(model, "--index", index, "--query", query) == 2
    assert "damaged" in complaint(capsys)


def test_two_galleries_with_the_same_names_are_told_apart_by_their_paths(model, photos, tmp_path, capsys):
    for name in ("north", "south"):
        shutil.copytree(photos / "pérson 1", tmp_path / name / "1")
    words = ["--gallery", tmp_path / "north", tmp_path / "south", "--top", 2, "--json", "-"]
    assert run(model, *words, "--query", tmp_path / "north" / "1" / "cam0_<0>&.png") == 0
    matches = json.loads(capsys.readouterr().out)["queries"][0]["matches"]
    assert {match["path"].split(os.sep)[-3] for match in matches} == {"north", "south"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--query", "Q"], "no gallery to search"),
        (["--gallery", "G"], "nothing to do"),
        (["--gallery", "nowhere", "--query", "Q"], "'nowhere' does not exist"),
        (["--gallery", "EMPTY", "--query", "Q"], "no image below"),
        (["--gallery", "G", "--query", "nowhere.png"], "nowhere.png"),
        (["--gallery", "G", "--query", "BOMB"], "too large"),
        (["--gallery", "G", "--query", "TEXT"], "it is not an image"),
        (["--gallery", "G", "--query", "Q", "--crop", "0", "0", "99", "5"], "16 pixels wide and 32 high"),
        (["--gallery", "G", "--query", "Q", "--top", "0"], "--top 0"),
        (["--gallery", "G", "--query", "Q", "--html", "nowhere/p.html"], "--html nowhere/p.html"),
        (["--gallery", "TEXTS", "--query", "Q"], "--skip-damaged"),
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
    assert run(model, *(names.get(word, word) for word in words), *outputs) == 2
    assert message in complaint(capsys) and not list(output.iterdir())


class Text(html.parser.HTMLParser):
    """What a page shows, and every address in it."""

    def __init__(self, text):
        super().__init__()
        self.words, self.addresses, self.hidden = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in ("script", "style")
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)


def check_page(text, found):
    read = Text(text)
    shown = " ".join(" ".join(read.words).split())
    assert read.addresses and all(address.startswith("data:image/jpeg;base64,") for address in read.addresses)
    assert len(read.addresses) == sum(1 + len(asked["matches"]) for asked in found["queries"])
    assert f"{found['gallery']} gallery images" in shown
    places = []
    for asked in found["queries"]:
        places.append(shown.index(f"query identity {asked['identity']} camera {asked['camera']}"))
        for match in asked["matches"]:
            about = f"identity {match['identity']} camera {match['camera']} "
            name = "/".join(match["path"].split("/")[-2:])
            mark = "✓" if match["same_identity"] else "✗"
            line = f"{mark} {match['rank']} {match['distance']:.4f} {about}{name}"
            places.append(shown.index(line, places[-1]))
    assert places == sorted(places)


@pytest.fixture(scope="module")
def written(model, photos, tmp_path_factory):
    """A page and the JSON of the same search."""
    folder = tmp_path_factory.mktemp("written")
    queries = [photos / f"pérson {number}" / "cam0_<1>&.png" for number in (1, 4)]
    files = ["--html", folder / "page é.html", "--json", folder / "r.json"]
    assert run(model, "--gallery", photos, "--query", *queries, "--top", 5, *files) == 0
    return folder / "page é.html", json.loads((folder / "r.json").read_text())


def test_the_page_is_whole_in_itself_and_says_what_the_json_says(written):
    path, found = written
    text = path.read_text()
    check_page(text, found)
    assert "default-src 'none'" in text and not re.search(r"https?://|url\(|@import|fetch\(", text)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed here: apt-get install chromium")
def test_a_browser_shows_what_the_json_says_and_asks_the_network_for_nothing(written, tmp_path):
    path, found = written
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={tmp_path / 'net.json'}",
        "--net-log-capture-mode=IncludeSensitive", "--virtual-time-budget=2000", "--dump-dom",
    ]  # fmt: skip
    # The script of the page runs here: it writes to the title how many pictures the browser could decode.
    probe = (
        '<script>addEventListener("load", () => document.title = [...document.images]'
        ".filter(image => image.naturalWidth > 0).length)</script>"
    )
    probed = path.with_name("probed.html")
    probed.write_text(path.read_text().replace("</body>", f"{probe}</body>"))
    done = subprocess.run([CHROMIUM, *flags, probed.as_uri()], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    check_page(done.stdout, found)
    pictures = sum(1 + len(asked["matches"]) for asked in found["queries"])
    assert f"<title>{pictures}</title>" in done.stdout
    log = (tmp_path / "net.json").read_text(errors="replace")
    asked_for = set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]+)"', log))
    assert '"events"' in log
    # The browser's own services are not the page's.
    assert not [url for url in asked_for if not re.search(r"google|gstatic|gvt1", url)], asked_for


def test_names_do_not_become_parts_of_the_page(tmp_path):
    evil = "</span><script>alert(1)</script>%%BODY%%"
    rows = [Ranked(Entry(evil, evil, evil), None, [Match(1, evil, 0.5, "", "")])]
    text = page.render(rows, "caption %%TITLE%%")
    assert "<script>alert" not in text and text.count("<section") == 1 and "caption %%TITLE%%" in text
    assert text.count("the picture cannot be read") == 2
    assert '<span class="mark"' not in text  # without identities nothing is right or wrong
