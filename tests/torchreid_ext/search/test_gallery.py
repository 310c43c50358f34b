"""A gallery finds what a slow search in float64 finds, keeps its file whole, and refuses what is not its own."""

import json
import os
import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pml_drsl.checks import InputError
from pml_drsl.evaluation.arrays import read_npz
from pml_drsl.evaluation.scores import evaluate
from torchreid_ext.images import Row
from torchreid_ext.search import gallery as module
from torchreid_ext.search.features import ExtractedSet, _read, read_gallery, write_features
from torchreid_ext.search.gallery import Gallery
from torchreid_ext.search.sources import resolved, shown


def model(metric="cosine", fingerprint="0123"):
    return types.SimpleNamespace(metric=metric, fingerprint=fingerprint, path="model.pth")


def draw(number, dim=8, seed=0):
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))


def slowly(queries, features, metric):
    """All distances, by a definition in float64."""
    left, right = queries.double()[:, None], features.double()[None]
    if metric == "cosine":
        return 1 - torch.cosine_similarity(left, right, dim=2)
    return (left - right).square().sum(dim=2)


@pytest.mark.parametrize(
    ("metric", "offset"), [("euclidean", 0), ("euclidean", 3000), ("cosine", 0)], ids=["squared", "far away", "cosine"]
)
def test_the_nearest_are_those_of_a_slow_search(metric, offset, monkeypatch):
    """Features that all lie far from the origin keep their small distances."""
    monkeypatch.setattr(module, "rows_per_chunk", lambda number: 7)
    features, queries = draw(300) + offset, draw(40, seed=1) + offset
    gallery = Gallery(model(metric))
    for rows in (range(50), range(50, 300)):
        gallery.add([Row(str(row)) for row in rows], features[list(rows)])
    found = np.array([[(int(match.name), match.distance) for match in near] for near in gallery.nearest(queries, 5)])
    expected, order = slowly(queries, features, metric).sort(dim=1)
    assert np.array_equal(found[..., 0], order[:, :5].numpy())
    assert np.abs(found[..., 1] - expected[:, :5].numpy()).max() < 1e-5 and (found >= 0).all()
    assert {len(near) for near in gallery.nearest(queries, 1000)} == {300}


def test_images_may_come_one_by_one_from_one_buffer():
    """As from a camera. The buffer is the caller's, and may hold the next image when it comes."""
    features, buffer = draw(33), torch.empty(1, 8)
    for metric in ("euclidean", "cosine"):
        alone, together = Gallery(model(metric)), Gallery(model(metric))
        for row in range(33):
            buffer.copy_(features[[row]])
            alone.add([Row(str(row))], buffer)
        together.add([Row(str(row)) for row in range(33)], features)
        assert alone.nearest(features, 5) == together.nearest(features, 5)
        assert alone.nearest(features.numpy(), 5, rerank=True) == together.nearest(features, 5, rerank=True)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_images_may_be_added_inside_and_outside_inference_mode(metric):
    gallery, features = Gallery(model(metric)), draw(12)
    for row, inside in ((range(10), True), ([10], True), ([11], False)):
        with torch.inference_mode(inside):
            gallery.add([Row(str(each)) for each in row], features[list(row)])
    assert [near[0].name for near in gallery.nearest(features, 1)] == [str(row) for row in range(12)]


def test_adding_removing_and_reranking():
    features = draw(300).requires_grad_()  # As they come from one's own network, where no_grad was forgotten.
    gallery = Gallery(model("euclidean"))
    gallery.add([Row(f"a{row}") for row in range(300)], features)
    assert [match.name for match in gallery.nearest(features[[7]], 1)[0]] == ["a7"]
    gallery.remove(["a7", "a9"])
    names = [match.name for match in gallery.nearest(features[[7]], 298)[0]]
    assert sorted(names) == sorted({f"a{row}" for row in range(300)} - {"a7", "a9"})
    gallery.add([Row("again")], features[[7]])
    assert gallery.nearest(features[[7]], 1)[0][0].name == "again"
    assert gallery.nearest(features[[8]], 1, rerank=True)[0][0].name == "a8"
    gallery.remove(["*"])
    with pytest.raises(InputError, match="gallery is empty"):
        gallery.nearest(features[[7]], 1)


def test_what_cannot_be_added_or_removed_changes_nothing():
    gallery, features = Gallery(model()), draw(4)
    with pytest.raises(InputError, match="NaN"):
        gallery.add([Row("x")], torch.full((1, 3), float("nan")))
    gallery.add([Row(name) for name in ("a/1", "a/2", "b/1", "b[1]")], features)
    before = gallery.nearest(features, 4)
    for entries, wrong, words in [
        ([Row("a/1")], features[:1], "is in the gallery already"),
        ([Row("x"), Row("x")], features[:2], "is in the gallery already"),
        ([Row("x")], features[:2], "1 images need as many features"),
        ([Row("x")], torch.zeros(1, 3), "3 dimensions"),
        ([Row("x")], torch.full((1, 8), float("inf")), "NaN or infinite"),
    ]:
        with pytest.raises(InputError, match=words):
            gallery.add(entries, wrong)
    for patterns, words in [
        (["a/1", "nobody"], "matches 'nobody': give"),
        (["**"], "matches all 4 images.*give '\\*'"),
        (["?*"], "matches all 4 images"),
    ]:
        with pytest.raises(InputError, match=words):
            gallery.remove(patterns)
    assert gallery.nearest(features, 4) == before
    # A name with the characters of a pattern is itself first.
    assert [entry.path for entry in gallery.remove(["b[1]"])] == ["b[1]"]
    gallery.add([Row("c [1]/1"), Row("c 1/1")], features[:2])
    assert [entry.path for entry in gallery.remove(["c [1]/*"])] == ["c [1]/1"]
    assert [entry.path for entry in gallery.remove(["c [12]/*"])] == ["c 1/1"]
    assert [entry.path for entry in gallery.remove(["a/*"])] == ["a/1", "a/2"]


def saved(folder, name="index"):
    """A gallery of five files below a folder, one file elsewhere and one name, saved in the folder."""
    gallery = Gallery(model())
    paths = [folder / "photos" / f"{number}.jpg" for number in range(5)]
    paths.append(folder.parent / f"{folder.name} elsewhere.jpg")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    entries = [Row(resolved(str(path)), str(row), "c") for row, path in enumerate(paths)]
    gallery.add([*entries, Row("a name.jpg")], draw(7))
    gallery.save(folder / name)
    return gallery


def test_a_gallery_comes_back_from_its_file_and_moves_with_its_folder(tmp_path):
    gallery = saved(tmp_path / "one")
    again = Gallery.load(tmp_path / "one" / "index", model())
    assert again.entries == gallery.entries and again.nearest(draw(2), 7) == gallery.nearest(draw(2), 7)
    (tmp_path / "one").rename(tmp_path / "two")
    moved = Gallery.load(tmp_path / "two" / "index", model())
    paths = [entry.path for entry in moved.entries]
    assert paths[0] == str(tmp_path / "two" / "photos" / "0.jpg") and paths[6] == "a name.jpg"
    assert paths[5] == str(tmp_path / "one elsewhere.jpg")
    # A link to the folder is another way to the same images.
    (tmp_path / "link").symlink_to(tmp_path / "two")
    assert resolved(str(tmp_path / "link" / "photos" / "3.jpg")) in moved
    (tmp_path / "two" / "photos" / "3.jpg").unlink()
    assert [entry.path for entry in moved.prune()] == [str(tmp_path / "two" / "photos" / "3.jpg")] and len(moved) == 6


def test_a_gallery_of_windows_is_read_elsewhere(tmp_path, monkeypatch):
    gallery = Gallery(model())
    monkeypatch.setattr(os, "sep", "\\")
    gallery.add([Row(f"{resolved(str(tmp_path))}/photos\\{name}") for name in ("anna\\1.jpg", "ben\\2.jpg")], draw(2))
    gallery.save(tmp_path / "index")
    assert [entry.path[-10:] for entry in gallery.remove(["*/anna/*"])] == ["anna\\1.jpg"]
    monkeypatch.undo()
    paths = [entry.path for entry in Gallery.load(tmp_path / "index", model()).entries]
    assert paths == [str(tmp_path / "photos" / "anna" / "1.jpg"), str(tmp_path / "photos" / "ben" / "2.jpg")]


def test_files_that_are_all_gone_are_on_a_disk_that_is_not_there(tmp_path):
    gallery = saved(tmp_path / "one")
    (tmp_path / "one elsewhere.jpg").unlink()
    (tmp_path / "one").rename(tmp_path / "two")
    with pytest.raises(InputError, match="the files of all 6 images are gone"):
        gallery.prune()
    assert len(gallery) == 7
    gallery.remove([str(tmp_path / "one*")])
    gallery.add([Row(str(tmp_path / "gone.jpg"))], draw(1, seed=5))
    assert [entry.path for entry in gallery.prune()] == [str(tmp_path / "gone.jpg")]  # of one image it may be true


def test_an_index_behind_a_link_is_that_of_its_own_folder(tmp_path):
    gallery = saved(tmp_path / "one")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "one" / "index")
    opened = Gallery.load(link, model())
    assert opened.entries == gallery.entries and not opened.prune()
    opened.remove(["a name.jpg"])
    opened.save(link)
    assert link.is_symlink() and Gallery.load(tmp_path / "one" / "index", model()).entries == gallery.entries[:-1]


def test_what_is_printed_can_be_removed(tmp_path, monkeypatch):
    gallery = saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    printed = [shown(entry.path) for entry in gallery.entries]
    assert printed[0] == os.path.join("photos", "0.jpg")
    for number, name in enumerate(printed):
        assert len(gallery.remove([name])) == 1 and len(gallery) == 6 - number
    for name in (f"{tmp_path}/\u00e9va.jpg", "\u00e9va.jpg", "\u00e9*"):  # A Mac writes e and an accent.
        gallery.add([Row(resolved(f"{tmp_path}/e\u0301va.jpg")), Row("another name")], draw(2))
        assert len(gallery.remove([name])) == len(gallery.remove(["*"])) == 1


def test_an_index_that_another_process_changed_is_not_overwritten(tmp_path):
    saved(tmp_path)
    first, second = (Gallery.load(tmp_path / "index", model()) for _ in range(2))
    for gallery in (first, second):
        gallery.add([Row(f"new {id(gallery)}")], draw(1, seed=5))
    first.save(tmp_path / "index")
    first.remove(["a name.jpg"])
    first.save(tmp_path / "index")  # its own changes are no one else's
    second.save(tmp_path / "copy")
    with pytest.raises(InputError, match="was changed by another process"):
        second.save(tmp_path / "index")
    assert Gallery.load(tmp_path / "index", model()).entries == first.entries


def test_an_index_of_an_older_version_is_refused_in_words(tmp_path):
    """It has an index in place of features."""
    texts = {"settings": {"fingerprint": "0123", "dim": 8, "metric": "cosine"}, "entries": [["/a.jpg", "", ""]]}
    arrays = {name: np.frombuffer(json.dumps(value).encode(), np.uint8) for name, value in texts.items()}
    np.savez(tmp_path / "old.npz", **arrays, numbers=np.arange(1), index=np.zeros(8, np.uint8))
    with pytest.raises(InputError, match=r"of an older version, .*: make it anew"):
        Gallery.load(tmp_path / "old.npz", model())


def test_an_index_of_another_model_is_refused(tmp_path):
    saved(tmp_path)
    for other in (model(fingerprint="other"), model(metric="euclidean")):
        with pytest.raises(InputError, match="index of another model"):
            Gallery.load(tmp_path / "index", other)


def test_a_write_that_fails_leaves_the_old_index(tmp_path, monkeypatch):
    gallery = saved(tmp_path)
    before = (tmp_path / "index").read_bytes()
    gallery.remove(["a name.jpg"])

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(module.np, "savez", fail)
    with pytest.raises(OSError, match="no space"):
        gallery.save(tmp_path / "index")
    assert (tmp_path / "index").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "photos"]
    with pytest.raises(InputError, match="gallery is empty"):
        Gallery(model()).save(tmp_path / "index")


def features_file(path):
    entries = [Row(str(path.parent / f"{row}.jpg"), str(row), "1") for row in range(4)]
    gallery = ExtractedSet(entries, draw(4))
    write_features(path, model(), {"query": gallery, "gallery": gallery})


@pytest.mark.parametrize("write", [lambda path: saved(path.parent), features_file])
def test_what_a_killed_process_left_of_a_large_file_is_removed_a_day_later(tmp_path, write):
    (left := tmp_path / ".index.0123456789abcdef.tmp").write_bytes(b"half")
    os.utime(left, (0, 0))
    write(tmp_path / "f.npz")
    assert not left.exists()


def test_an_image_without_a_camera_leaves_the_cameras_of_the_others(tmp_path):
    rows = [Row(f"/photos/{pid}_{camera}.jpg", str(pid), str(camera)) for pid in range(9) for camera in range(2)]
    known, unknown = ExtractedSet(rows, draw(18)), Row("/photos/zed/1.jpg", "zed")
    both = ExtractedSet([*rows, unknown], torch.cat([known.features, draw(1, seed=5)]))
    found = []
    for gallery in (known, both):
        assert write_features(tmp_path / "f.npz", model(), {"query": known, "gallery": gallery})
        found.append(evaluate(**read_npz(str(tmp_path / "f.npz"))))
        assert read_gallery(tmp_path / "f.npz", model()).entries == gallery.entries
    # No query finds itself, though each is in the gallery too.
    assert found[0].num_junk == found[1].num_junk == 18 and abs(found[0].mAP - found[1].mAP) < 0.1


def test_a_loading_process_sends_one_array_a_batch():
    # Each tensor takes open files, and a batch of 500 images took more than there are.
    def prepared(path, crop):
        if path == "x.png":
            raise InputError("damaged")
        return torch.full((3, 4, 2), float(path))

    indices, images, errors = _read(prepared, None, [(3, "0"), (5, "x.png"), (7, "1")])
    assert indices == [3, 7] and [*map(str, errors)] == ["'x.png': damaged"]
    assert np.array_equal(images, np.stack([np.zeros((3, 4, 2)), np.ones((3, 4, 2))]))
    assert _read(prepared, None, [(0, "x.png")])[:2] == ([], None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    saved(folder, "index.npz")
    features_file(folder / "features.npz")
    return folder


def refused(path):
    """Whether a file is refused in one line without advice to load it unsafely; any other error fails the test."""
    outcomes = []
    for read in (Gallery.load, read_gallery):
        try:
            read(path, model())
            outcomes.append(False)
        except InputError as error:
            text = str(error)
            assert "\n" not in text and "pickle" not in text and "max_header_size" not in text
            outcomes.append(True)
    return all(outcomes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_wrong_contents_with_valid_checksums_are_refused(files, data):
    name = data.draw(st.sampled_from(["index.npz", "features.npz"]))
    with np.load(files / name) as loaded:
        arrays = {key: loaded[key] for key in loaded.files}
    key = data.draw(
        st.sampled_from(["settings", "entries", "features"] if name == "index.npz" else ["gallery", "gallery_paths"])
    )
    if key in ("settings", "entries"):
        texts = JSON.map(lambda value: json.dumps(value).encode())
        arrays[key] = np.frombuffer(data.draw(texts | st.binary(min_size=1)), np.uint8)
    else:
        shape = data.draw(st.sampled_from([(), (0,), (3,), (3, 8), (4, 8, 1), (7, 0), (4, 0, 8)]))
        arrays[key] = np.zeros(shape, data.draw(st.sampled_from(["f4", "i8", "U3", "c8", "?", "V4", "M8[s]"])))
    np.savez(files / "changed.npz", **arrays)
    assert refused(files / "changed.npz")


def test_what_is_no_file_of_arrays_is_refused(tmp_path):
    path = tmp_path / "file.npz"
    with pytest.raises(FileNotFoundError):
        refused(path)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    assert refused(path)
    np.savez(path, settings=np.array([{}], dtype=object))
    assert refused(path)
