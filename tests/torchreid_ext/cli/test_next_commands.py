"""The commands that a run ends with can be typed as they are printed."""

import ntpath
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import trained

from torchreid_ext.cli import evaluate, export, search, train
from torchreid_ext.cli.train import next_commands
from torchreid_ext.data import splits
from torchreid_ext.evaluation import errors

CHECKPOINT = Path("model", "model-best.pth.tar")
PEOPLE = r"(?P<identity>\d+)_(?P<camera>\d)_\d\.png"  # of the names that are drawn


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a run's folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [""])  # of a session of Python; pytest has the commands beside it
    options = {"model.name": "squeezenet1_1", "data.height": 64, "data.width": 32}
    options |= {"data.sources": "drawn", "data.targets": "drawn", "datasets.drawn.folder": "images"}
    trained.train(folder, **options, **{"datasets.drawn.pattern": PEOPLE})
    *_, heading, first, second, third = capsys.readouterr().out.splitlines()
    assert heading.startswith("Next, ")
    return first, second, third


def test_all_commands_work_as_printed(printed, capsys, monkeypatch):
    monkeypatch.setattr(errors, "_drawn", lambda *given: "")  # Figures take seconds.
    first, second, third = map(shlex.split, printed)
    assert (first[0], second[0], third[0]) == ("drsl-search", "drsl-export", "drsl-evaluate")
    assert first[-2:] == ["--names", PEOPLE]
    assert search.main([*first[1:], "--workers", "0"]) == 0
    # The gallery of this run is all images in one folder, the query among them, which is no match of its own.
    asked = first[first.index("--query") + 1]
    lines = capsys.readouterr().out.splitlines()
    (about,) = (line for line in lines if asked in line)
    assert re.fullmatch(rf"query {asked} \(identity \d+, camera \d\)", about)
    assert any(re.match(r" +1  0\.\d+ +(same|other) +identity +\d+ +camera", line) for line in lines)
    assert Path(first[first.index("--html") + 1]).read_text().startswith("<!doctype html>")
    assert export.main(second[1:]) == 0 and Path(second[-1]).is_file()
    assert evaluate.main(third[1:]) == 0 and Path(third[1], "errors.html").is_file()


def test_without_a_checkpoint_there_is_nothing_to_do_next(tmp_path):
    assert next_commands(str(tmp_path), ["a.png"], ["b.png"]) == ""


@pytest.fixture
def finished(tmp_path):
    (tmp_path / CHECKPOINT).parent.mkdir()
    (tmp_path / CHECKPOINT).write_bytes(b"")
    return str(tmp_path)


def test_programs_beside_the_launcher_are_named_with_their_folder_where_it_is_not_on_the_path(
    finished, tmp_path, monkeypatch
):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("drsl-train", "drsl-search", "drsl-export", "drsl-evaluate"):
        (bin_folder / name).write_text("")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(bin_folder / "drsl-train")])
    for path, start in (("", bin_folder), ("bin", Path())):
        monkeypatch.setenv("PATH", str(tmp_path / path))
        lines = next_commands(finished, ["/x/query/1.png"], ["/x/a/1.png", "/x/b/2.png"]).splitlines()
        names = [str(start / f"drsl-{name}") for name in ("search", "export", "evaluate")]
        assert [shlex.split(line)[0] for line in lines[1:]] == names
    page = os.path.join(tmp_path, "search.html")
    assert shlex.split(lines[1])[3:] == ["/x", "--query", "/x/query/1.png", "--html", page]


def test_the_whole_disk_is_not_searched(finished):
    images = ["/x/b/1.png", "/y/a/2.png", "/x/b/3.png"]
    line = next_commands(finished, ["/x/query/1.png"], images).splitlines()[1]
    assert "--gallery /x/b --query" in line


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"pattern": r"(?:.*/)?(?P<identity>[^/]+)/[^/]+\.jpg"}, "photos/new/test"),
        ({"pattern": r"(?:.*/)?test/(?P<identity>[^/]+)/.*"}, "photos"),  # as in configs/omniglot.yaml
        ({"pattern": r"new/test/(?P<identity>[^/]+)/.*", "folder": ["old", "photos"]}, "photos"),
        ({"pattern": r"(?P<identity>[^/]+/[^/]+)/.*"}, "photos"),  # The identities are new/test and anna/1.jpg.
        ({"csv": "photos/list.csv"}, "photos/list.csv"),
    ],
)
def test_the_gallery_is_searched_where_names_carry_the_identities_of_the_run(finished, tmp_path, options, place):
    if "csv" not in options:
        options = {"folder": ["photos"], "cameras": "none"} | options
    own = splits.make_options("mine", options)
    gallery = [str(tmp_path / "photos" / "new" / "test" / person / "1.jpg") for person in ("anna", "ben")]
    line = next_commands(finished, gallery[:1], gallery, own, str(tmp_path)).splitlines()[1]
    words = shlex.split(line)
    assert words[words.index("--gallery") + 1] == str(tmp_path / place)
    assert words[words.index("--names") + 1 :] == [own.pattern] if "csv" not in options else "--names" not in words


def test_of_a_data_set_in_several_folders_those_with_images_of_the_gallery_are_searched(finished, tmp_path):
    own = splits.make_options("mine", {"folder": ["a", "b", "c"], "cameras": "none"})
    gallery = [str(tmp_path / folder / person / "1.jpg") for folder in ("a", "c") for person in ("anna", "ben")]
    words = shlex.split(next_commands(finished, gallery[:1], gallery, own, str(tmp_path)).splitlines()[1])
    assert words[words.index("--gallery") + 1 : words.index("--query")] == [str(tmp_path / "a"), str(tmp_path / "c")]


def test_a_gallery_on_two_drives_of_windows(finished, monkeypatch):
    for name in ("abspath", "commonpath", "dirname"):
        monkeypatch.setattr(os.path, name, getattr(ntpath, name))
    monkeypatch.setattr(train, "_quoted", subprocess.list2cmdline)  # which cmd.exe and PowerShell read
    images = ["D:\\b\\1.png", "C:\\a b\\2.png"]
    line = next_commands(finished, ["C:\\q\\1.png"], images).splitlines()[1]
    assert '--gallery "C:\\a b" --query C:\\q\\1.png --html' in line
