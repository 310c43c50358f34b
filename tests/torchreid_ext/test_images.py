"""The table of images: what names say, what is left out, and CSV files of every kind."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from people_folders import draw

from pml_drsl.checks import InputError
from torchreid_ext import images
from torchreid_ext.images import Row, spelt

# Names that phones, cameras, messengers, screenshots and scanners give.
PHOTOS = """\
IMG_2034.jpg Downloads/IMG_2034.jpg IMG_20240517_103015.jpg IMG-20240517-WA0003.jpg PXL_20240517_103015123.MP.jpg
20240517_103015.jpg 20240517_103015(0).jpg 2024-05/DSC_8.jpg 2024/05/17/DSC01234.JPG DSCN0001.jpg DSCF1234.jpg
_MG_0001.jpg P1000123.JPG GOPR0001.jpg DJI_0001.jpg frames/frame_0001.jpg frames/000001.png photo_2024-05-17_10-30.jpg
signal-2024-05-17-103015_002.jpeg Screenshot_20240517-103015_Chrome.png WhatsApp_Image_2024-05-17.jpeg image0.jpeg
00001IMG_00001_BURST20240517103015123_COVER.jpg MVIMG_20240517.jpg 100_0001.jpg anna/hall_1.jpg 1.png scan_c1.png
0000_000_01_0303morning_0015_0.jpg 0001_c001_00016450_0.jpg
"""


def test_ordinary_photos_carry_no_identity() -> None:
    paths = [f"/home/me/{name}" for name in PHOTOS.split()]
    assert len(paths) == 30
    assert [images.named(path, images.pattern("market")) for path in paths] == [Row(path) for path in paths]


@pytest.mark.parametrize(
    ("names", "path", "identity", "camera"),
    [
        ("market", "x/0002_c1s1_000451_03.jpg", "0002", "1"),
        ("market", "-1_c3s1_000451_03.jpg", "-1", "3"),
        ("market", "0005_c2_f0046985.jpg", "0005", "2"),
        ("folder", "Zoë Ødegård/hall_1.png", "Zoë Ødegård", "hall"),
        ("folder", "more/anna/1.JPG", "anna", ""),
        ("folder", "Jose\u0301/1.jfif", "Jos\u00e9", ""),
        ("msmt17", "train/0000/0000_000_01_0303morning_0015_0.jpg", "0000", "01"),
        ("veri", "image_train/0001_c001_00016450_0.jpg", "0001", "001"),
        (r"(?P<identity>[a-z]+)-(?P<camera>\d)\..*", "my/photos/anna-3.png", "anna", "3"),
        (r"(?P<identity>[^/]+)/(?:(?P<camera>\d+)-)?.*", "photos/anna/x.png", "anna", ""),
        (r"(?P<identity>[a-z]*)\d+\..*", "photos/12.png", "", ""),
        ("veri", "anna/hall_1.png", "", ""),
        ("folder", "1.png", "", ""),
    ],
)
def test_names_carry_what_the_user_says(names: str, path: str, identity: str, camera: str) -> None:
    assert images.named(path, images.pattern(names)) == Row(path, identity, camera)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("(", "not a regular"),
        ("(a)/.*", "no group .*market, msmt"),
        ("foldr", "'foldr' is unknown; the nearest is 'folder': give one of market, msmt"),
    ],
)
def test_wrong_names_are_refused(names: str, words: str) -> None:
    with pytest.raises(InputError, match=f"--names.*{words}"):
        images.pattern(names, "--names")


def test_a_folder_counts_and_names_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchreid_ext.pixels.HEIF", ())  # As without pillow-heif.
    monkeypatch.setattr("torchreid_ext.pixels.SUFFIXES", (".jpg", ".png"))
    hidden = ".hidden/4.png anna/._5.jpg anna/@eaDir/1.jpg/M.jpg #recycle/ben/1.jpg $RECYCLE.BIN/S-1/1.jpg"
    for name in ("anna/1.jpg", "anna/2.JPG", "-1/3.png", *hidden.split()):
        draw(tmp_path / name)
    for name in ("IMG_1.HEIF", "clip.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    table = images.list_folder(str(tmp_path), images.pattern("folder"))
    assert [row[1:] for row in table.rows] == [("anna", "", "gallery")] * 2
    line = table.about_left_out()
    assert "files of kinds that are not read (3: 'IMG_1.HEIF', 'clip.mp4', ...; pip install pillow-heif" in line
    assert "images of junk (1: '-1/3.png')" in line


GOOD = "path,pid,camid,split\na.png,7,1,train\nb.png,8,2,query\nc.png,8,3,gallery\nd.png,-1,1,gallery\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("csv")
    for name in "abcd":
        draw(place / f"{name}.png")
    return place


def read(folder: Path, data: bytes, cameras: bool | None = True) -> list[tuple[str, ...]]:
    (folder / "list.csv").write_bytes(data)
    table = images.read_csv(str(folder / "list.csv"), cameras)
    return [(Path(row.path).name, *row[1:]) for row in table.rows]


def test_good_files(folder: Path) -> None:
    expected = [("a.png", "7", "1", "train"), ("b.png", "8", "2", "query"), ("c.png", "8", "3", "gallery")]
    assert read(folder, GOOD.encode()) == expected
    for changed in ("\ufeff" + GOOD, GOOD.replace("\n", "\r\n"), GOOD.replace(",", " , "), GOOD.replace("\n", ",,\n")):
        assert read(folder, changed.encode()) == expected
    for changed in (GOOD.replace(",", ";"), GOOD.replace(",", "\t"), GOOD.replace("\n", "\n,,,\n", 3)):
        assert read(folder, changed.encode()) == expected
    for cameras in (False, None):
        assert read(folder, b"path,pid,split\na.png,7,train\n", cameras) == [("a.png", "7", "", "train")]
    unknown = [expected[0], ("b.png", "8", "", "query"), expected[2]]
    assert read(folder, GOOD.replace("8,2,", "8,,").encode(), None) == unknown
    no_cameras = read(folder, GOOD.replace("camid", "Camera").encode(), False)
    assert no_cameras == [(*row[:2], "", row[3]) for row in expected]
    assert read(folder, 'split,pid,path,x,camid\ntrain,"Zoë, A.",a.png,,1'.encode()) == [
        ("a.png", "Zoë, A.", "1", "train")
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GOOD.encode("utf-16"), "line 1: .*UTF-16.*CSV UTF-8"),
        (GOOD.encode("utf-16-le"), "line 1: .*UTF-16"),
        (GOOD.replace("8,2", "Zoë,2").encode("latin-1"), "line 3: 'Zoë' is not UTF-8 but perhaps Latin-1.*CSV UTF-8"),
        (GOOD.replace("b.png", "ä.png").encode("latin-1"), "line 3: 'ä.png' is not UTF-8"),
        (GOOD.replace("path,pid", "Path,PID").encode(), "line 1: .*no column 'path'.*in lower case: path,pid,camid"),
        (GOOD.replace("b.png", "b,c.png").encode(), "line 3: there are 5 values for 4 columns.*double quotes"),
        (GOOD.replace("b.png", "e.png").encode(), "line 3: there is no file .*e.png"),
        (GOOD.replace("query", "test").encode(), "line 3: split='test'"),
        (GOOD.replace("b.png", "a.png").encode(), "line 3: a.png is in the CSV twice"),
        (GOOD.replace(",2,", ",,").encode(), "line 3: camid is empty"),
        (GOOD.replace("-1,1", "-1.0,1").encode(), r"line 5: -1\.0 is no name: write -1 \(in pandas: astype"),
        (GOOD.replace("7,1", "7,1.0").encode(), r"line 2: 1\.0 is no name: write 1 "),
        *(
            (
                GOOD.replace("7,1", f"{lost},1").encode(),
                rf"line 2: {re.escape(lost)} stands for a missing value, or for a ",
            )
            for lost in ("nan", "#N/A", "2.02401E+11", "2.0240101123456788e+16")
        ),
        (GOOD.encode() + b'"' + b"x" * 200_000, "line 6: field larger than"),
        (GOOD.encode() + b'c.png,8,3,"gallery\n', "line 6: unexpected end of data: correct the quotes"),
        (GOOD.replace("split", "split,pid").encode(), "line 1: .*two columns 'pid'"),
        (b"", "line 1: the file has no column 'path'"),
    ],
)
def test_other_files_are_explained_with_file_line_and_cure(folder: Path, data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=f"list.csv, {words}"):
        read(folder, data)


@pytest.mark.parametrize("name", ["CamId", "camera", "cam", "Kamera", "cid"])
def test_a_misspelt_column_does_not_leave_the_cameras_out(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"line 1: .*a column '{name}' and no 'camid'"):
        read(folder, GOOD.replace("camid", name).encode(), None)


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_file", ["NFC", "NFD"])
def test_a_list_from_another_system(tmp_path: Path, on_disk: str, in_file: str) -> None:
    """Windows writes the names of folders with backslashes, and a Mac may write é as e and an accent."""
    draw(tmp_path / unicodedata.normalize(on_disk, "José") / "1.png")
    lines = "path,pid,camid,split\nJosé/1.png,José,é,query\nJosé\\1.png,Jos\u00e9,\u00e9,gallery\n"
    expected = [("1.png", "Jos\u00e9", "\u00e9", split) for split in ("query", "gallery")]
    first, second, third = unicodedata.normalize(in_file, lines).splitlines()
    third = third.replace(unicodedata.normalize(in_file, ",José,é,"), ",Jos\u00e9,\u00e9,")
    assert read(tmp_path, "\n".join([first, second, third]).encode()) == expected


WORD = st.sampled_from([
    *images.COLUMNS, *images.SPLITS, "a.png", "b.png", "7", "-1", "Zoë", "", ".", "..", "/",
])  # fmt: skip
CELL = WORD | st.text(max_size=5) | st.sampled_from(['"', '""', "'", "\ud800", "\x00", "\r", "\\", "\ufeff", "a" * 300])
LINE = st.lists(CELL, max_size=6).flatmap(
    lambda cells: st.sampled_from([",", ";", "\t", ", "]).map(lambda c: c.join(cells))
)
TEXT = st.lists(LINE, max_size=5).map("\n".join)
CODEC = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252"])


@settings(
    max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(head=st.sampled_from(["", "path,pid,camid,split\n"]), text=TEXT, codec=CODEC, noise=st.binary(max_size=3))
def test_any_text_is_read_or_explained(folder: Path, head: str, text: str, codec: str, noise: bytes) -> None:
    try:
        read(folder, (head + text).encode(codec, "replace") + noise)
    except InputError as error:
        assert "list.csv, line" in str(error) and "\n" not in str(error).replace(text, "")


def test_numbers_of_torchreid_become_names_only_where_all_names_tell_the_same_apart() -> None:
    paths = ["a/0002_c1s1_000001_00.jpg", "a/0002_c2s1_000002_00.jpg", "b/0007_c1s1_000003_00.jpg"]
    rows = [Row(path, pid, camera, "query") for path, pid, camera in zip(paths, "001", "010", strict=True)]
    names = [("0002", "1"), ("0002", "2"), ("0007", "1")]
    assert spelt(rows) == [Row(path, *name, "query") for path, name in zip(paths, names, strict=True)]
    two_sets = [*rows, Row("c/0002_c1s1_000009_00.jpg", "2", "0", "query")]
    other_cameras = [row._replace(camera=str(number)) for number, row in enumerate(rows)]
    for kept in (two_sets, other_cameras, [*rows, Row("anna.jpg", "2", "0", "query")], []):
        assert spelt(kept) == kept
