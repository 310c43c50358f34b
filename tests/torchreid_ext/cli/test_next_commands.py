"""The commands that a run ends with can be typed as they are printed."""

import ntpath
import os
import shlex
from pathlib import Path

import pytest
import trained

from torchreid_ext.cli import export, search
from torchreid_ext.cli.train import next_commands


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a run's folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    trained.train(folder, **{"model.name": "squeezenet1_1", "data.height": 64, "data.width": 32})
    *_, heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.startswith("Next, ")
    return first, second


def test_both_commands_work_as_printed(printed, capsys):
    first, second = map(shlex.split, printed)
    assert (first[0], second[0]) == ("drsl-search", "drsl-export")
    assert search.main([*first[1:], "--workers", "0"]) == 0
    # The gallery of this run is all images in one folder, the query among them, which is no match of its own.
    asked = first[first.index("--query") + 1]
    lines = capsys.readouterr().out.splitlines()
    assert f"query {asked}" in lines and sum(asked in line for line in lines) == 1
    assert any(line.lstrip().startswith("1  0.") for line in lines)
    assert Path(first[-1]).read_text().startswith("<!doctype html>")
    assert export.main(second[1:]) == 0 and Path(second[-1]).is_file()


def test_without_a_checkpoint_there_is_nothing_to_do_next(tmp_path):
    assert next_commands(str(tmp_path), ["a.png"], ["b.png"]) == ""


def test_programs_beside_the_launcher_are_named_with_their_folder(tmp_path, monkeypatch):
    bin_folder = tmp_path / "bin"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model-best.pth.tar").write_bytes(b"")
    bin_folder.mkdir()
    for name in ("drsl-train", "drsl-search", "drsl-export"):
        (bin_folder / name).write_text("")
    monkeypatch.setattr("sys.argv", [str(bin_folder / "drsl-train")])
    lines = next_commands(str(tmp_path), ["/x/query/1.png"], ["/x/a/1.png", "/x/b/2.png"]).splitlines()
    assert shlex.split(lines[1])[0] == str(bin_folder / "drsl-search")
    assert shlex.split(lines[1])[3:] == [
        "/x",
        "--query",
        "/x/query/1.png",
        "--html",
        os.path.join(tmp_path, "search.html"),
    ]


def test_the_whole_disk_is_not_searched(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model-best.pth.tar").write_bytes(b"")
    line = next_commands(str(tmp_path), ["/x/query/1.png"], ["/x/b/1.png", "/y/a/2.png", "/x/b/3.png"]).splitlines()[1]
    assert "--gallery /x/b --query" in line


def test_a_gallery_on_two_drives_of_windows(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model-best.pth.tar").write_bytes(b"")
    for name in ("abspath", "commonpath", "dirname"):
        monkeypatch.setattr(os.path, name, getattr(ntpath, name))
    line = next_commands(str(tmp_path), ["C:\\q\\1.png"], ["D:\\b\\1.png", "C:\\a\\2.png"]).splitlines()[1]
    assert shlex.split(line)[3:6] == ["C:\\a", "--query", "C:\\q\\1.png"]
