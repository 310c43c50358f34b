"""The page shows what it was given, asks the network for nothing, and can be used by keyboard alone. The picture has
the right images at the right places, in the right colours."""

import html.parser
import json
import re
import subprocess
import urllib.parse

import browser
import numpy as np
import pytest
from PIL import Image

from torchreid_ext.evaluation import page
from torchreid_ext.evaluation.page import Found, Picture, Ranking, ranking_picture, shown_distance, tiled, write_pages


class Text(html.parser.HTMLParser):
    """What a page shows, every address in it, and the accessible names of its buttons."""

    def __init__(self, text):
        super().__init__()
        self.words, self.addresses, self.names, self.hidden = [], [], [], 0
        self.feed(text)
        self.shown = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in ("script", "style")
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.names += [dict(attrs)["aria-label"] for _ in [0] if tag == "button" and "aria-label" in dict(attrs)]

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two queries with three matches each: right, junk and wrong."""
    folder = tmp_path_factory.mktemp("my phótos & <more>")
    files = []
    for index in range(4):
        pixels = np.full((40 + index, 20, 3), 60 * index, np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        files.append(str(folder / f"{index}.png"))
    matches = [
        Found(Picture(files[1], "anna", "c2"), -1e-9, "right", 1),
        Found(Picture(files[2], "anna", "c1"), 0.25, "junk", 1),
        Found(Picture([*files, *files], "ben", "c3"), 1.5, "wrong", 2),
    ]
    query = Picture(files[0], "anna", "c1", crop=(0, 0, 10, 20))
    return [Ranking(query, matches, "AP 50.0%"), Ranking(Picture(files[3]), matches[:2])]


@pytest.fixture(scope="module")
def written(rows, tmp_path_factory):
    # A table wider than the window scrolls by itself, and the keys leave it alone.
    figures = f"<aside><figure><table><tr>{'<td>12.3%</td>' * 40}</tr></table></figure></aside>"
    (path,) = write_pages(tmp_path_factory.mktemp("pages") / "page é.html", rows, "5 images", "A title", figures)
    return path


def check(text):
    read = Text(text)
    assert len(read.addresses) == 7 and all(address.startswith("data:image/jpeg;base64,") for address in read.addresses)
    places = [
        read.shown.index(words)
        for words in (
            "A title 5 images", "0.png - AP 50.0% query identity anna camera c1 part 0, 0 to 10, 20",
            "✓ 1 0.0000 identity anna camera c2 same identity", "- junk 0.2500 identity anna camera c1",
            "✗ 2 1.5000 identity ben camera c3 another identity", "0.png and 7 more", "3.png query my ph",
        )
    ]  # fmt: skip
    assert places == sorted(places) and "-0.0000" not in text
    assert read.names[:4] == [
        "query, identity anna, camera c1, part 0, 0 to 10, 20, 0.png",
        "rank 1, distance 0.0000, identity anna, camera c2, same identity, 1.png",
        "junk, distance 0.2500, identity anna, camera c1, same identity and camera, left out, 2.png",
        "rank 2, distance 1.5000, identity ben, camera c3, another identity, 0.png",
    ]


def test_the_page_shows_what_it_was_given_and_is_whole_in_itself(written):
    text = written.read_text(encoding="utf-8")
    check(text)
    assert "default-src 'none'" in text and 'name="viewport"' in text
    assert not re.search(r"https?://|url\(|@import|fetch\(", text)


def test_names_do_not_become_parts_of_the_page(tmp_path):
    evil = "</span><script>alert(1)</script>%%BODY%%\udcff"
    found = Found(Picture(evil, evil), 0.5, "", 1)
    write_pages(tmp_path / "p.html", [Ranking(Picture(evil, evil, evil), [found], evil)], "caption %%TITLE%%")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and text.count("<section") == 1 and "caption %%TITLE%%" in text
    assert text.count("the picture cannot be read") == 2
    assert '<span class="mark"' not in text  # without identities nothing is right or wrong


def test_many_queries_are_on_several_pages_that_link_to_each_other(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "QUERIES_PER_PAGE", 2)
    pages = write_pages(tmp_path / "p.html", rows * 2 + rows[:1], "caption")
    assert [path.name for path in pages] == ["p.html", "p-2.html", "p-3.html"]
    texts = [path.read_text(encoding="utf-8") for path in pages]
    assert [text.count("<section") for text in texts] == [2, 2, 1] and 'id="query5"' in texts[2]
    assert 'href="p-3.html"' in texts[0] and 'href="p.html"' in texts[2]


@pytest.mark.parametrize("name", ["a#b.html", "50%25 off?.html", "run: 1.html", 'é "<&>.html', "b\udcff.html"])
def test_links_lead_to_pages_of_any_name(rows, tmp_path, monkeypatch, name):
    monkeypatch.setattr(page, "QUERIES_PER_PAGE", 1)
    first, second = write_pages(tmp_path / name, rows, "caption")
    for here, there in ((first, second), (second, first)):
        (link,) = (word for word in Text(here.read_text(encoding="utf-8")).addresses if not word.startswith("data:"))
        assert urllib.parse.urljoin(here.as_uri(), link) == there.as_uri()


@pytest.mark.parametrize("size", [(400, 1), (1, 900)])
def test_a_line_of_pixels_is_shown(size):
    shown = np.asarray(tiled([Image.new("RGB", size, "red")], (96, 192)))
    assert shown.shape == (192, 96, 3) and (shown == (255, 0, 0)).all(axis=2).sum() == (96 if size[1] == 1 else 192)


def test_distances_have_no_negative_zero():
    texts = [shown_distance(value) for value in (-1e-9, 0.0, -0.00006, 0.12345)]
    assert texts == ["0.0000", "0.0000", "-0.0001", "0.1235"]


PROBE = """<script>addEventListener("load", () => {
  const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true, bubbles: true}));
  const dialog = document.querySelector("dialog"), seen = {};
  const shown = () => dialog.open ? dialog.getAttribute("aria-label").split(",")[0] : "closed";
  const focused = () => (document.activeElement.getAttribute("aria-label") || "none").split(",")[0];
  seen.pictures = [...document.images].filter(image => image.naturalWidth > 0).length;
  seen.scrolls = press("ArrowDown");
  const cards = document.querySelectorAll("main .card");
  cards[0].focus();
  seen.scrollsWithFocus = press("ArrowDown");
  press("ArrowRight");
  seen.moved = focused();
  document.activeElement.click();
  seen.walk = [shown()];
  for (const key of ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"]) {
    press(key);
    seen.walk.push(shown());
  }
  seen.close = dialog.querySelector("button").textContent;
  seen.markInDialog = getComputedStyle(dialog.querySelector(".mark")).display;
  seen.wordsInDialog = getComputedStyle(dialog.querySelector(".words")).display;
  press("Escape");
  seen.escaped = [shown(), focused()];
  document.activeElement.click();
  press("ArrowRight");
  dialog.querySelector("button").click();
  setTimeout(() => {
    seen.after = [shown(), focused()];
    seen.wide = document.documentElement.scrollWidth <= innerWidth;
    document.title = JSON.stringify(seen);
  }, 50);
});</script>"""


@pytest.mark.skipif(browser.PATH is None, reason="no chromium is installed here: apt-get install chromium")
def test_a_browser_shows_it_walks_through_it_and_asks_the_network_for_nothing(written, tmp_path):
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={tmp_path / 'net.json'}", "--window-size=500,800",
        "--net-log-capture-mode=IncludeSensitive", "--virtual-time-budget=2000", "--dump-dom",
    ]  # fmt: skip
    probed = written.with_name("probed.html")
    probed.write_text(written.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    done = subprocess.run([browser.PATH, *flags, probed.as_uri()], capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout.decode())[1]))
    assert seen == {
        "pictures": 7,
        # The browser may scroll: no one took the key.
        "scrolls": True,
        "scrollsWithFocus": True,
        "moved": "rank 1",
        "walk": ["rank 1", "junk", "rank 2", "rank 2", "junk", "junk", "junk"],
        "close": "Close",
        "markInDialog": "none",
        "wordsInDialog": "block",
        "escaped": ["closed", "junk"],
        "after": ["closed", "rank 2"],
        "wide": True,
    }
    asked_for = set(
        re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]+)"', (tmp_path / "net.json").read_text(errors="replace"))
    )
    # The browser's own services are not the page's.
    assert not [url for url in asked_for if not re.search(r"google|gstatic|gvt1", url)], asked_for


# Smoothed grey text does not contain these colours.
BLUE, OLIVE, PINK = (20, 40, 220), (120, 120, 20), (250, 120, 200)
RIGHT, WRONG = page.FRAMES["right"], page.FRAMES["wrong"]


@pytest.fixture
def images(tmp_path):
    paths = {}
    for number, colour in enumerate((BLUE, OLIVE, PINK)):
        paths[colour] = str(tmp_path / f"{number}.png")
        Image.new("RGB", (32, 64), colour).save(paths[colour])
    return paths


def ranked(query, *matches):
    found = [Found(Picture(files), far, mark, rank) for rank, (files, far, mark) in enumerate(matches, 1)]
    return Ranking(Picture(query), found)


def columns(page, colour):
    """The x coordinates of all pixels of this colour."""
    pixels = page.load()
    return [x for x in range(page.width) for y in range(page.height) if pixels[x, y] == colour]


def test_query_stands_left_of_the_gallery_in_order(images):
    row = ranked(images[BLUE], (images[OLIVE], 0.25, "right"), (images[PINK], 1.5, "wrong"))
    page = ranking_picture([row], "title")
    assert max(columns(page, BLUE)) < min(columns(page, OLIVE)) <= max(columns(page, OLIVE)) < min(columns(page, PINK))
    # Each frame surrounds its own image.
    assert min(columns(page, RIGHT)) < min(columns(page, OLIVE))
    assert max(columns(page, RIGHT)) < min(columns(page, PINK))
    assert max(columns(page, OLIVE)) < min(columns(page, WRONG)) < min(columns(page, PINK))
    assert max(columns(page, WRONG)) > max(columns(page, PINK))


def test_right_and_wrong_differ_even_without_colour(images):
    shapes = []
    for mark, colour in (("right", RIGHT), ("wrong", WRONG)):
        page = ranking_picture([ranked(images[BLUE], (images[OLIVE], 0.5, mark))], "title")
        found = {(x, y) for x in range(page.width) for y in range(page.height) if page.getpixel((x, y)) == colour}
        shapes.append(found)
    assert shapes[0] != shapes[1]


def test_rank_and_distance_and_title_are_written(images):
    def page(title, distance):
        return ranking_picture([ranked(images[BLUE], (images[OLIVE], distance, "right"))], title)

    assert page("one", 0.1).tobytes() != page("two", 0.1).tobytes()
    for distance in (0.1, 12345.6788):  # Features that are not normalised have such distances.
        assert page("one", distance).tobytes() != page("one", distance + 0.0001).tobytes()
    long, longer = page("word " * 60, 0.1), page("word " * 90, 0.1)
    assert long.size == page("one", 0.1).size and long.tobytes() == longer.tobytes()


def test_a_row_per_query_and_unequal_galleries(images):
    full = ranked(images[BLUE], *[(images[OLIVE], 0.1, "right")] * 5)
    empty = ranked(images[PINK])
    one, two = ranking_picture([full], ""), ranking_picture([full, empty], "")
    assert two.width == one.width and two.height > 1.7 * (one.height - 100)
    assert columns(two, PINK)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows is empty"):
        ranking_picture([], "title")


def test_junk_has_no_colour(images):
    row = ranked(images[BLUE], (images[OLIVE], 0.1, "junk"), (images[PINK], 0.2, "wrong"))
    page = ranking_picture([row], "title")
    assert not columns(page, OLIVE)
    assert not columns(page, RIGHT)
    assert min(columns(page, WRONG)) < min(columns(page, PINK))


def test_a_tracklet_shows_images_from_its_whole_length(images):
    tracklet = [images[BLUE]] * 5 + [images[OLIVE]] * 5 + [images[PINK]] * 10
    page = ranking_picture([ranked(images[BLUE], (tracklet, 0.1, "right"))], "title")
    quarter = len(columns(page, PINK)) / 2
    assert len(columns(page, OLIVE)) == quarter > 100
