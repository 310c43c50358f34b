"""``drsl-evaluate``: both forms of input, and one clear line for each kind of bad input."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pml_drsl.evaluation.scores import evaluate
from torchreid_ext.cli.evaluate import main


@pytest.fixture
def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "query": rng.standard_normal((12, 4), dtype=np.float32),
        "gallery": rng.standard_normal((40, 4), dtype=np.float32),
        "query_ids": rng.integers(0, 4, 12),
        "gallery_ids": rng.integers(0, 4, 40),
        "query_cams": rng.integers(0, 2, 12),
        "gallery_cams": rng.integers(0, 2, 40),
    }


def save_npy(folder: Path, arrays: dict[str, Any], header: str = "set,id,camera") -> list[str]:
    lines = [header]
    for side in ("gallery", "query"):
        np.save(folder / f"{side}.npy", arrays[side])
        for identity, camera in zip(arrays[f"{side}_ids"], arrays[f"{side}_cams"], strict=True):
            values = {"set": side, "id": f"p{identity}", "camera": f"c{camera}"}
            lines.append(",".join(values[name] for name in header.split(",")))
    (folder / "ids.csv").write_text("\n".join(lines) + "\n")
    return [str(folder / name) for name in ("query.npy", "gallery.npy", "ids.csv")]


def test_npz(tmp_path: Path, arrays: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path, scores = tmp_path / "features.npz", tmp_path / "scores.json"
    np.savez(path, **arrays, paths=np.array(["an array that is not ours"]))
    options = ["--metric", "cosine", "--ties", "pessimistic", "--ranks", "1", "3", "--json", str(scores)]
    assert main([str(path), *options]) == 0
    output = capsys.readouterr()
    expected = evaluate(**arrays, metric="cosine", ties="pessimistic")
    assert json.loads(scores.read_text()) == expected.to_dict()
    assert output.err == ""  # no progress bar outside a terminal
    first, *rows = output.out.splitlines()
    assert first.startswith("12 queries (0 without a match, not scored), 40 gallery images, cosine distance; ")
    assert f"{expected.num_junk} pairs left out (the same image, or the same person and camera)" in first
    assert [row.split() for row in rows] == [
        ["mAP", f"{expected.mAP:.2%}"],
        ["mINP", f"{expected.mINP:.2%}"],
        ["rank-1", f"{expected.rank(1):.2%}"],
        ["rank-3", f"{expected.rank(3):.2%}"],
    ]
    assert main([str(path), *options[:-1], "-"]) == 0
    assert json.loads(capsys.readouterr().out) == expected.to_dict()
    assert {each.name for each in tmp_path.iterdir()} == {"features.npz", "scores.json"}


def test_no_image_is_its_own_match_where_paths_are_known(tmp_path: Path, arrays: dict[str, Any], capsys: Any) -> None:
    alone = {name: arrays[name] for name in ("query", "query_ids")} | {"query_paths": np.array([*"abcdefghijkl"])}
    both = {name.replace("query", "gallery"): values for name, values in alone.items()}
    cameras = {"query_cams": np.zeros(12), "gallery_cams": np.zeros(12)}
    np.savez(tmp_path / "f.npz", **alone, **both, **cameras)
    assert main([str(tmp_path / "f.npz"), "--no-cameras"]) == 0
    own = {"query_cams": np.arange(12), "gallery_cams": np.arange(12)}
    expected = evaluate(arrays["query"], arrays["query"], arrays["query_ids"], arrays["query_ids"], **own)
    out = capsys.readouterr().out
    assert "12 pairs left out (the same image" in out and f"{expected.mAP:.2%}" in out


@pytest.mark.parametrize("header", ["set,id,camera", "camera,set,id", "set,id"])
def test_npy_and_csv(tmp_path: Path, arrays: dict[str, Any], header: str) -> None:
    query, gallery, ids = save_npy(tmp_path, arrays, header)
    if header == "set,id":  # as spreadsheets write UTF-8, some with semicolons
        changed = Path(ids).read_bytes().replace(b"\n", b"\r\n").replace(b",", b";")
        Path(ids).write_bytes(b"\xef\xbb\xbf" + changed)
    scores = tmp_path / "scores.json"
    assert main([query, gallery, "--ids", ids, "--json", str(scores)]) == 0
    if "camera" not in header:
        arrays = {name: array for name, array in arrays.items() if not name.endswith("cams")}
    assert json.loads(scores.read_text()) == evaluate(**arrays).to_dict()


@pytest.mark.parametrize(
    ("option", "keyword"),
    [
        ([], {"metric": "cosine"}),  # as the file says
        (["--no-cameras"], {"query_cams": None, "gallery_cams": None}),
        (["--rerank"], {"rerank": True}),
        (["--junk", "2", "3"], {"junk": (2, 3)}),
        (["--protocol", "single-gallery-shot", "--seed", "3"], {"protocol": "single-gallery-shot", "seed": 3}),
    ],
)
def test_options(tmp_path: Path, arrays: dict[str, Any], option: list[str], keyword: dict[str, Any]) -> None:
    np.savez(tmp_path / "f.npz", **arrays, metric="cosine")
    distance = [] if "metric" in keyword else ["--metric", "euclidean"]
    assert main([str(tmp_path / "f.npz"), "--json", str(tmp_path / "s.json"), *option, *distance]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == evaluate(**(arrays | keyword)).to_dict()


def test_bad_input_is_one_line(tmp_path: Path, arrays: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    query, gallery, ids = save_npy(tmp_path, arrays)

    def npz(**change: Any) -> list[str]:
        np.savez(tmp_path / "f.npz", **{k: v for k, v in (arrays | change).items() if v is not None})
        return [str(tmp_path / "f.npz")]

    def text(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    complete = Path(npz()[0]).read_bytes()
    objects = tmp_path / "objects.npz"
    np.savez(objects, query=np.array([{}], dtype=object))
    os.mkfifo(pipe := tmp_path / "pipe")
    rows = Path(ids).read_text()
    bad_csv = text("bad.csv", b"set,id,camera\nquery,1,1\ntrain,2,1\n")
    cases: list[tuple[list[str] | Any, str]] = [
        (["nowhere.npz"], "nowhere.npz"),
        ([text("empty.npz", b"")], "empty.npz is not a readable"),
        ([text("garbage.npz", b"garbage" * 9)], "garbage.npz is not a readable"),
        ([text("pickle.npz", pickle.dumps([1]))], "pickle.npz is not a readable"),
        ([text("cut.npz", complete[: len(complete) // 2])], "cut.npz is not a readable"),
        ([str(objects)], "plain arrays"),
        ([query], "single array"),
        (lambda: npz(gallery_ids=None), "lacks gallery_ids"),
        (lambda: npz(query_cams=None, query_cam=arrays["query_cams"]), "did you mean 'query_cams'"),
        (lambda: npz(query_cams=None), "gallery_cams without query_cams"),
        (lambda: npz(query=arrays["query"] * np.nan), "NaN"),
        (lambda: npz(query=np.array([["a"]])), "floating-point"),
        (lambda: npz(metric=np.array("cos")), "unknown metric 'cos': choose one of 'euclidean', 'cosine'"),
        (lambda: npz(query_cams=np.zeros(12, int), gallery_cams=np.zeros(40, int)), "another camera"),
        (lambda: [*npz(), "--ids", ids], "--ids goes with"),
        (lambda: [*npz(), "--ranks", "0"], "--ranks 0"),
        (lambda: [*npz(), "--seed", "-5"], "seed=-5: give 0 or more"),
        (lambda: [*npz(), "--json", str(tmp_path / "no" / "s.json")], "/no': make it"),
        ([query, gallery], "need --ids"),
        ([query, gallery, gallery], "3 feature files"),
        (lambda: [*npz(), "--json", npz()[0]], "would overwrite the input"),
        ([query, gallery, "--ids", ids, "--json", str(tmp_path / "." / "gallery.npy")], "would overwrite the input"),
        (lambda: [*npz(), "--json", str(tmp_path)], "is a folder: give the name of a file"),
        (lambda: [*npz(), "--json", str(pipe)], "is a device or a pipe: give the name of a file"),
        (lambda: [*npz(), "--junk", "-1", "nobody"], "--junk nobody: no image has this identity"),
        ([query, "f.npz".join([str(tmp_path) + "/", ""]), "--ids", ids], "is an .npz file"),
        ([gallery, query, "--ids", ids], "12 query lines for 40 query features"),
        ([query, gallery, "--ids", bad_csv], "line 3: set='train' must be query or gallery"),
        (
            [query, gallery, "--ids", text("head.csv", b"id,cam\n")],
            "no column 'set': the first line must name set,id, and may",
        ),
        ([query, gallery, "--ids", text("cam.csv", b"set,id,cam\n")], "a column 'cam' and no 'camera'"),
        ([query, gallery, "--ids", text("view.csv", b"set,id,view\n")], "a column 'view' and no 'camera'"),
        ([query, gallery, "--ids", text("no.csv", (rows + "query,1,").encode())], "line 54: camera is empty"),
        ([query, gallery, "--ids", text("f.csv", (rows + "query,-1.0,1").encode())], "line 54: -1.0 is no name"),
        ([query, gallery, "--ids", text("1.csv", (rows + "query,é,1").encode("latin-1"))], "line 54: 'é' is not UTF-8"),
    ]
    for arguments, message in cases:
        assert main(arguments() if callable(arguments) else arguments) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert len(output.err.splitlines()) == 1 and message in output.err, (message, output.err)


def test_junk_is_left_out_and_said(tmp_path: Path, arrays: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arrays["gallery_ids"][:5] = -1
    np.savez(tmp_path / "f.npz", **arrays)
    assert main([str(tmp_path / "f.npz")]) == 0
    assert "35 gallery images" in (first := capsys.readouterr().out.splitlines()[0])
    assert first.endswith("5 images with a junk identity left out")
    assert main([str(tmp_path / "f.npz"), "--junk"]) == 0
    assert "40 gallery images" in capsys.readouterr().out


class TestFuzz:
    """A damaged or crafted file ends in scores or in one line, never in a traceback."""

    quiet = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

    @quiet
    @given(data=st.data())
    def test_npz(self, data: st.DataObject, tmp_path: Path, arrays: dict[str, Any], capsys: Any) -> None:
        file = io.BytesIO()
        np.savez(file, **arrays)
        content = bytearray(file.getvalue())
        # The headers of numpy and of zip: they alone decide what the rest means.
        starts = [i for i in range(len(content)) if content[i : i + 6] == b"\x93NUMPY" or content[i : i + 2] == b"PK"]
        for _ in range(data.draw(st.integers(1, 3))):
            place = min(data.draw(st.sampled_from(starts)) + data.draw(st.integers(0, 127)), len(content) - 1)
            content[place] = data.draw(st.integers(0, 255))
        self.check(bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))]), tmp_path, capsys)

    @quiet
    @given(data=st.data())
    def test_plain_npy_headers(self, data: st.DataObject, tmp_path: Path, arrays: dict[str, Any], capsys: Any) -> None:
        file = io.BytesIO()
        np.save(file, arrays["query"])
        content = bytearray(file.getvalue())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
        (tmp_path / "q.npy").write_bytes(content)
        _, gallery, ids = save_npy(tmp_path, arrays)
        self.run([str(tmp_path / "q.npy"), gallery, "--ids", ids], capsys)

    @quiet
    @given(data=st.data())
    def test_csv(self, data: st.DataObject, tmp_path: Path, arrays: dict[str, Any], capsys: Any) -> None:
        query, gallery, ids = save_npy(tmp_path, arrays)
        content = bytearray(Path(ids).read_bytes())
        alphabet = st.sampled_from([*b'\n\r,;"\t\0 -1pc', 0x85, 0xE9, 0xFF])
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(alphabet | st.integers(0, 255))
        Path(ids).write_bytes(content)
        self.run([query, gallery, "--ids", ids], capsys)

    def test_odd_arrays(self, tmp_path: Path, arrays: dict[str, Any], capsys: Any) -> None:
        changes: list[dict[str, Any]] = [
            {"query": np.float32(1)},
            {"query": np.ones((12, 4), ">f4"), "gallery": np.ones((40, 4), "<f8")},
            {"query": np.ones((12, 4), "c8")},
            {"query": np.ones((12, 4), "m8[s]")},
            {"query": np.ones((12, 0), "f4")},
            {"query_ids": np.array([b"\xff"] * 12), "gallery_ids": np.array(["\xff"] * 40)},
            {"query_ids": np.full(12, 2**63, "u8"), "gallery_ids": np.full(40, -5)},
            {"query_ids": np.zeros(12, [("a", "i4")])},
            {"query_ids": np.zeros((12, 1), int)},
            {"gallery_cams": np.array(["a"] * 40)},
        ]
        for change in changes:
            file = io.BytesIO()
            np.savez(file, **(arrays | change))
            self.check(file.getvalue(), tmp_path, capsys)

    def check(self, content: bytes, folder: Path, capsys: Any) -> None:
        (folder / "f.npz").write_bytes(content)
        self.run([str(folder / "f.npz")], capsys)

    def run(self, arguments: list[str], capsys: Any) -> None:
        status = main(arguments)
        output = capsys.readouterr()
        if status == 0:
            assert output.out
        else:
            assert status == 2 and len(output.err.splitlines()) == 1 and "allow_pickle" not in output.err
