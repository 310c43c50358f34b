"""The commands that a run ends with can be typed as they are printed."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import trained

from torchreid_ext.cli import evaluate, export, search
from torchreid_ext.cli.train import next_commands
from torchreid_ext.evaluation import errors

CHECKPOINT = Path("model", "model-best.pth.tar")
PEOPLE = r"(?P<identity>\d+)_(?P<camera>\d)_\d\.png"  # of the names that are drawn


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a run's folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [""])  # of a session of Python; pytest has the commands beside it
    options = trained.SMALL | {"data.sources": "drawn", "data.targets": "drawn", "datasets.drawn.folder": "images"}
    trained.train(folder, **options, **{"datasets.drawn.pattern": PEOPLE})
    *_, heading, first, second, third = capsys.readouterr().out.splitlines()
    assert heading.startswith("Next, ")
    return first, second, third


def test_all_commands_work_as_printed(printed, capsys, monkeypatch):
    monkeypatch.setattr(errors, "_drawn", lambda *given: "")  # Figures take seconds.
    first, second, third = map(shlex.split, printed)
    assert (first[0], second[0], third[0]) == ("drsl-search", "drsl-export", "drsl-evaluate")
    assert search.main([*first[1:], "--workers", "0"]) == 0
    # The gallery of this run has the query too, which is no match of its own. Its names say who is on the test images,
    # although the pattern is known to the run alone.
    asked = first[first.index("--query") + 1]
    lines = capsys.readouterr().out.splitlines()
    (about,) = (line for line in lines if asked in line)
    assert re.fullmatch(rf"query {asked} \(identity \d+, camera \d\)", about)
    gallery = int(next(word for line in lines if "gallery images" in line for word in line.split() if word.isdecimal()))
    assert gallery == json.loads(Path(first[1], "metrics.json").read_text())["drawn"]["num_gallery"]
    assert any(re.match(r" +1  0\.\d+ +(same|other) +identity +\d+ +camera", line) for line in lines)
    assert Path(first[first.index("--html") + 1]).read_text().startswith("<!doctype html>")
    assert export.main(second[1:]) == 0 and Path(second[-1]).is_file()
    assert evaluate.main(third[1:]) == 0 and Path(third[1], "errors.html").is_file()


def test_without_a_checkpoint_there_is_nothing_to_do_next(tmp_path):
    assert next_commands(str(tmp_path), "a.png") == ""


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
        lines = next_commands(finished, "/x/query/1.png").splitlines()
        names = [str(start / f"drsl-{name}") for name in ("search", "export", "evaluate")]
        assert [shlex.split(line)[0] for line in lines[1:]] == names
    page = os.path.join(tmp_path, "search.html")
    assert shlex.split(lines[1])[1:] == [str(tmp_path), "--query", "/x/query/1.png", "--html", page]
