"""The page finds what the search in Python finds, refuses what it cannot use, and works in a real browser."""

import asyncio
import contextlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
import zlib

import browser
import numpy as np
import pytest
import trained
from PIL import Image

from torchreid_ext import Searcher
from torchreid_ext.cli import search

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from torchreid_ext.search import serve  # noqa: E402

NAMES = r"(?P<identity>\d+)_(?P<camera>\d+)_\d+\.png"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trained.train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def photos(model, tmp_path_factory):
    """Images of six people in the folders ``hall``, ``hall/dark <&>`` and ``door``, by their shots."""
    folder = tmp_path_factory.mktemp("photos")
    for index, path in enumerate(sorted((model.parents[2] / "images").glob("[0-5]_*.png"))):
        place = folder / ("hall", "hall/dark <&>", "door")[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return folder


@pytest.fixture(scope="module")
def searcher(model, photos):
    made = Searcher(model, device="cpu", names=NAMES)
    made.add(sorted(map(str, photos.rglob("*.png"))))
    return made


@contextlib.contextmanager
def running(searcher, **options):
    """The address of a real server in a thread."""
    with serve.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        app = serve.application(searcher, hosts=["127.0.0.1"], **options)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:  # or a test that fails would keep pytest from ending
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def address(searcher):
    with running(searcher) as address:
        yield address


def ask(address, data=None, headers=(), **parameters):
    """Status and text of an answer; ``data`` is posted to the search."""
    url = f"{address}/search?{urllib.parse.urlencode(parameters, doseq=True)}" if data is not None else address
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, dict(headers)), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def listed(fragment):
    """The name and the distance of each image that was found, in the order of their ranks."""
    found = re.findall(r'aria-label="rank (\d+), distance ([\d.]+),[^"]*, ([^",]+)"', fragment)
    assert [int(rank) for rank, *_ in found] == list(range(1, len(found) + 1))
    return [(distance, name) for _, distance, name in found]


def expected(matches):
    # The distance of an image to itself is 0, but for its rounding.
    return [(f"{abs(match.distance):.4f}", os.path.basename(match.name)) for match in matches]


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_it_finds_what_the_search_in_python_finds(searcher, photos, address):
    (path,) = photos.rglob("2_1_0.png")
    data = path.read_bytes()
    status, found = ask(address, data, top=7)
    assert status == 200 and listed(found) == expected(searcher.search(str(path), top=7)[0])
    assert 'class="mark"' not in found and found.count("<img") == 8  # a photo without a name has no identity
    assert 'class="mark"' in ask(address, data, name="2_1_0.png")[1]
    # A part of a larger photo that lies on its side, as its EXIF says.
    street = Image.new("RGB", (60, 90), (40, 90, 40))
    street.paste(Image.open(path), (30, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(street.transpose(Image.Transpose.ROTATE_90), exif=exif)
    box = 30, 50, 46, 82
    matches = searcher.search(street, top=4, crop=box)[0]
    assert listed(ask(address, turned, top=4, crop=box)[1]) == expected(matches) and matches[0].name == str(path)
    with running(searcher, rerank=True, top=3) as reranked:
        assert 'value="3"' in ask(reranked)[1]
        assert listed(ask(reranked, data)[1]) == expected(searcher.search(str(path), rerank=True)[0])


def test_camera_folder_and_own_file_choose(searcher, photos, address):
    (path,) = photos.rglob("2_1_0.png")
    everything = searcher.search(str(path), top=len(searcher))[0]
    page = ask(address)[1]
    hall = str(photos / "hall")
    assert f'<option value="{hall}">' in page and f'<option value="{hall}/dark &lt;&amp;&gt;">' in page
    cases = [
        ({"camera": "0"}, lambda match: match.camera == "0"),
        ({"folder": hall}, lambda match: match.name.startswith(f"{hall}/")),
        ({"folder": f"{hall}/dark <&>"}, lambda match: "dark" in match.name),
        ({"others": "on"}, lambda match: match.name != str(path)),
        ({"others": "on", "camera": "1", "folder": hall}, lambda match: match.camera == "1" and hall in match.name),
    ]
    for chosen, wanted in cases:
        rows = [
            match for match in everything if wanted(match) and not (chosen.get("others") and match.name == str(path))
        ]
        assert 0 < len(rows) < len(everything)
        for top in (2, 100):
            assert listed(ask(address, path.read_bytes(), top=top, **chosen)[1]) == expected(rows[:top])
    for wrong in ({"camera": "9"}, {"folder": "/"}):
        status, said = ask(address, path.read_bytes(), **wrong)
        assert status == 400 and "no image of the gallery is of" in said


def test_what_cannot_be_used_is_refused_in_a_line(address, monkeypatch):
    photo = saved(Image.new("RGB", (20, 40)))
    # A header of 60 megapixels, with no pixels behind it.
    large = bytearray(photo)
    large[16:24] = struct.pack(">II", 6000, 10001)
    large[29:33] = struct.pack(">I", zlib.crc32(large[12:29]))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    cases = [
        (b"", {}, 400, "is empty"),
        (b"no image", {}, 400, "not an image"),
        (program, {}, 400, "not an image"),  # Pillow would start another program for it
        (photo[:60], {}, 400, "damaged"),
        (bytes(large), {}, 400, "more than 50 megapixels"),
        (photo, {"crop": (0, 0, 21, 10)}, 400, "crop 0 0 21 10"),
        (photo, {"crop": (0, 0, 2)}, 400, "crop: "),
        (photo, {"top": 0}, 400, "top: "),
        (photo, {"top": 501}, 400, "top: "),
    ]
    for data, parameters, status, words in cases:
        answer, said = ask(address, data, **parameters)
        assert answer == status and words in said and "\n" not in said and "<" not in said, said
    monkeypatch.setattr(serve, "MEGABYTES", 0.01)
    assert ask(address, bytes(10_000))[0] == 400
    status, said = ask(address, bytes(10_001))
    assert status == 400 and "more than 0.01 megabytes: make it smaller" in said
    assert ask(address, headers={"Host": "evil.example"}.items()) == (400, "Invalid host header")
    assert ask(address, photo, headers={"Host": "evil.example"}.items())[0] == 400


@pytest.mark.parametrize("whole", [False, True], ids=["half", "whole"])
def test_an_upload_that_the_browser_aborts_is_no_error(searcher, monkeypatch, whole):
    """As the protocol of ASGI has it: the server would print what the application raises."""
    photo = saved(Image.new("RGB", (20, 40)))
    received = iter([{"type": "http.request", "body": photo, "more_body": not whole}, {"type": "http.disconnect"}])
    sent = []
    monkeypatch.setattr(searcher, "extract", lambda *_: pytest.fail("nobody waits for this search"))

    async def receive():
        return next(received)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/search", "query_string": b"", "headers": [(b"host", b"a")]}
    asyncio.run(serve.application(searcher)(scope, receive, send))
    assert sent[0]["status"] == 400


def test_an_empty_gallery_is_told(model):
    with running(Searcher(model, device="cpu")) as address:
        assert "<select" not in ask(address)[1]  # there is nothing to choose
        assert ask(address, saved(Image.new("RGB", (20, 40)))) == (400, "the gallery is empty: add images to it first")


def test_the_command_serves_until_it_is_interrupted(model, photos, tmp_path, capsys):
    words = [model, "--gallery", photos, "--index", tmp_path / "index"]
    words += ["--serve", "0", "--workers", "0", "--device", "cpu"]
    program = "import sys; from torchreid_ext.cli.search import main; sys.exit(main())"
    folder = tmp_path / "empty"
    folder.mkdir()
    command = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, words)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=folder,
        env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )  # fmt: skip
    address = ""
    for line in command.stdout:
        if found := re.search(r"http://\S+", line):
            address = found[0]
            break
    before = (tmp_path / "index").read_bytes()
    assert ask(address, saved(Image.effect_noise((3000, 3000), 50)))[0] == 200
    assert ask(address, headers={"Host": "evil.example"}.items()) == (400, "Invalid host header")
    taken = urllib.parse.urlsplit(address).port
    assert search.main([str(model), "--gallery", str(photos), "--serve", str(taken)]) == 2
    assert re.fullmatch(f"drsl-search: cannot listen at port {taken} .*another port.*\n", capsys.readouterr().err)
    command.send_signal(2)
    said = command.communicate(timeout=30)[1]
    assert command.returncode == 0 and "Traceback" not in said and "interrupted" not in said, said
    assert (tmp_path / "index").read_bytes() == before and not [*folder.iterdir()]


def test_what_cannot_go_together_is_refused(model, photos, capsys):
    for option in (["--query", "x.png"], ["--html", "x.html"], ["--json", "-"], ["--crop", "0", "0", "1", "1"]):
        assert search.main([str(model), "--gallery", str(photos), "--serve", "0", *option]) == 2
        assert "--serve searches on its page" in capsys.readouterr().err
    for host, port in (("nowhere.invalid", "0"), ("127.0.0.1", "65536")):
        assert search.main([str(model), "--gallery", str(photos), "--host", host, "--serve", port]) == 2
        assert "cannot listen at port" in capsys.readouterr().err


LOOK = "({ground: getComputedStyle(document.body).backgroundColor, wide: document.documentElement.scrollWidth})"


@pytest.mark.skipif(browser.PATH is None, reason="no chromium is installed here: apt-get install chromium")
def test_a_browser_drops_crops_searches_and_walks(searcher, photos, address, tmp_path):
    (path,) = photos.rglob("2_1_0.png")
    street = Image.new("RGB", (900, 600), (40, 90, 40))
    street.paste(Image.open(path).resize((160, 320)), (300, 180))
    street.save(tmp_path / "street.png")
    with browser.Browser(tmp_path / "profile") as page:
        page("Emulation.setDeviceMetricsOverride", width=1200, height=1200, deviceScaleFactor=1, mobile=False)
        page("Page.navigate", url=address)
        page.until("document.readyState == 'complete'")
        page.drop(tmp_path / "street.png")
        page.until("document.querySelectorAll('main li').length == 10")
        assert page.js("document.querySelector('main h2').textContent") == "street.png"
        # The box is dragged over the person, from its lower right corner, in the photo's own pixels.
        shown = page.js("document.querySelector('.stage img').getBoundingClientRect().toJSON()")
        scale = shown["width"] / 900
        corners = [(shown["x"] + x * scale, shown["y"] + y * scale) for x, y in ((460, 500), (400, 400), (300, 180))]
        page.drag(*corners)
        page.until("document.querySelector('main .query .about')?.textContent.startsWith('part')")
        drawn = page.js("document.querySelector('.box').getBoundingClientRect().toJSON()")
        sides = [drawn[side] for side in ("right", "bottom", "left", "top")]
        assert np.abs(np.subtract(sides, [*corners[0], *corners[2]])).max() < 2
        box = page.js("[...document.querySelectorAll('fieldset input')].map(edge => Number(edge.value))")
        assert np.abs(np.subtract(box, (300, 180, 460, 500))).max() <= 3
        page.js("""(() => {
            const edges = document.querySelectorAll('fieldset input');
            [300, 180, 460, 500].forEach((value, index) => edges[index].value = value);
            document.querySelector("[name=top]").value = 3;
            document.querySelector("[name=top]").focus();
        })()""")
        page.press("Enter")
        page.until("document.querySelectorAll('main li').length == 3")
        drawn = page.js("document.querySelector('main').innerHTML")
        assert listed(drawn) == expected(searcher.search(street, top=3, crop=(300, 180, 460, 500))[0])
        assert page.js("document.querySelector('[role=status]').textContent") == "3 images found"
        # Results that came later are walked through like those of a page that was written.
        page.js("document.querySelector('main .card').focus()")
        spoken = "document.querySelector('dialog').getAttribute('aria-label').split(',')[0]"
        page.press("Enter")
        page.until("document.querySelector('dialog').open")
        walk = [page.js(spoken)]
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown"):
            page.press(key)
            walk.append(page.js(spoken))
        assert walk == ["query", "rank 1", "rank 2", "rank 1", "rank 1"]
        page.press("Escape")
        assert page.js("document.activeElement.getAttribute('aria-label').startsWith('rank 1')")
        assert not page.js("document.querySelector('dialog').open")
        grounds = set()
        page("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=2, mobile=True)
        for scheme in ("light", "dark"):
            page("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            look = page.js(LOOK)
            assert look["wide"] == 390
            grounds.add(look["ground"])
        assert grounds == {"rgb(246, 246, 244)", "rgb(20, 20, 22)"}
        (tmp_path / "text.txt").write_text("no image")
        page.drop(tmp_path / "text.txt")
        assert "not an image" in page.until("document.querySelector('.failed')?.textContent")
        asked = [url for url in page.asked if not url.startswith(("blob:", "data:image/jpeg"))]
        assert asked and all(url.startswith(f"{address}/") for url in asked), asked
