"""The search in Python finds what torch finds, keeps its gallery whole, and refuses what is not its own."""

import threading

import numpy as np
import pytest
import torch
import trained
from PIL import Image

import torchreid_ext
from pml_drsl.checks import InputError
from pml_drsl.evaluation import reranking
from torchreid_ext import Searcher
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.search import gallery
from torchreid_ext.search.sources import Entry


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trained.train(tmp_path_factory.mktemp("run"), **{"model.bnneck": True})


@pytest.fixture(scope="module")
def paths(model):
    return sorted(map(str, (model.parents[2] / "images").glob("*.png")))


@pytest.fixture
def searcher(model):
    return Searcher(model, device="cpu")


def test_it_is_part_of_the_package():
    assert "Searcher" in torchreid_ext.__all__


def test_the_ranking_is_that_of_the_features(searcher, paths):
    searcher.add(paths[8:])
    features = searcher.extract(paths)
    distances = 1 - torch.cosine_similarity(features[:8, None].double(), features[None, 8:].double(), dim=2)
    for row, expected in zip(searcher.search(paths[:8], top=5), distances, strict=True):
        assert [match.rank for match in row] == [1, 2, 3, 4, 5]
        assert np.allclose([match.distance for match in row], expected.sort().values[:5], atol=1e-6)
        for match in row:
            assert abs(expected[paths[8:].index(match.name)] - match.distance) < 1e-6
    assert len(searcher) == len(paths) - 8


def test_the_reranked_ranking_is_that_of_the_whole_gallery(searcher, paths):
    searcher.add(paths[8:])
    features = searcher.extract(paths)
    expected = reranking.rerank(features[:8], features[8:], metric="cosine").rows(0, 8)
    for row, distances in zip(searcher.search(paths[:8], top=40, rerank=True), expected, strict=True):
        assert len(row) == len(paths) - 8
        assert np.allclose([match.distance for match in row], distances.sort().values, atol=1e-5)


def test_names_carry_identity_and_camera(searcher, paths):
    picture = Image.open(paths[0])
    searcher.add([picture, np.array(picture)], ["Zoë/hall_1.png", "0002_c3s1_000451_03.jpg"])
    first, second = searcher.search(picture)[0]
    assert {(m.identity, m.camera) for m in (first, second)} == {("Zoë", "hall"), ("0002", "3")}
    assert abs(first.distance) < 1e-6
    with pytest.raises(InputError, match="need names"):
        searcher.add(picture)
    with pytest.raises(InputError, match="1 images need as many names, got 2"):
        searcher.add(picture, ["a", "b"])


def test_batches_of_any_size_give_the_same_features(model, paths):
    whole = Searcher(model, device="cpu", batch_size=100).extract(paths)
    assert (Searcher(model, device="cpu", batch_size=3).extract(paths) - whole).abs().max() < 1e-5


def test_several_threads_search_while_another_adds(searcher, paths):
    searcher.add(paths[:8])
    expected, found, errors = searcher.search(paths[0], top=1)[0][0].name, [], []

    def look():
        try:
            found.extend(searcher.search(paths[0], top=1)[0][0].name for _ in range(5))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    threads.append(threading.Thread(target=lambda: [searcher.add(path) for path in paths[8:16]]))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(searcher) == 16 and found == [expected] * 20


def test_a_gallery_is_kept_in_a_file(searcher, model, paths, tmp_path):
    searcher.add(paths[:10])
    assert searcher.remove([paths[3], "*_1_*"]) > 1
    searcher.save(tmp_path / "my gallery.index")
    again = Searcher(model, index=tmp_path / "my gallery.index", device="cpu")
    assert again.gallery.entries == searcher.gallery.entries
    assert again.search(paths[3]) == searcher.search(paths[3])
    again.add(paths[3])
    assert again.search(paths[3], top=1)[0][0].name == paths[3]


@pytest.mark.parametrize("exact_below", [1000, 12])
def test_what_fails_changes_nothing(searcher, paths, monkeypatch, exact_below):
    searcher.gallery.exact_below = exact_below
    searcher.add(paths[:14])
    before = searcher.search(paths[20], top=14)
    for wrong, words in [
        ([paths[3]], "is in the gallery already"),
        ([paths[15], paths[15]], "is in the gallery already"),
        ([paths[15], "nowhere.png"], "nowhere.png"),
    ]:
        with pytest.raises(InputError, match=words):
            searcher.add(wrong)
    with pytest.raises(InputError, match="no image of the gallery matches 'nobody'"):
        searcher.remove([paths[2], "nobody"])
    with pytest.raises(InputError, match="dimensions"):
        searcher.add_features([Entry("x")], torch.zeros(1, 3))
    assert searcher.search(paths[20], top=14) == before


def test_an_index_of_another_model_is_refused(searcher, model, paths, tmp_path):
    searcher.add(paths[:4])
    searcher.save(tmp_path / "index")
    state = checkpoint.load(model)
    state["state_dict"]["conv1.conv.weight"][0, 0, 0, 0] += 1e-3
    checkpoint.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match="index of another model"):
        Searcher(tmp_path / "other.pth", index=tmp_path / "index")
    state = checkpoint.load(model)
    state["training"]["config"]["test.dist_metric"] = "euclidean"
    checkpoint.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match="index of another model"):
        Searcher(tmp_path / "other.pth", index=tmp_path / "index")


@pytest.mark.parametrize("spoil", ["cut", "byte", "features", "empty", "text"])
def test_a_damaged_index_is_refused(searcher, model, paths, tmp_path, spoil):
    searcher.add(paths[:4])
    index = tmp_path / "index"
    searcher.save(index)
    data = index.read_bytes()
    if spoil == "features":
        np.savez(tmp_path / "f.npz", gallery=np.zeros((3, 4)))
        data = (tmp_path / "f.npz").read_bytes()
    middle = len(data) // 2
    changes = {
        "cut": data[:middle], "empty": b"", "text": b"no index",
        "byte": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
    }  # fmt: skip
    index.write_bytes(changes.get(spoil, data))
    with pytest.raises(InputError, match="index"):
        Searcher(model, index=index)


def test_a_write_that_fails_leaves_the_old_index(searcher, model, paths, tmp_path, monkeypatch):
    searcher.add(paths[:4])
    searcher.save(tmp_path / "index")
    before = (tmp_path / "index").read_bytes()
    searcher.add(paths[4:8])

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(gallery.np, "savez", fail)
    with pytest.raises(OSError, match="no space"):
        searcher.save(tmp_path / "index")
    assert (tmp_path / "index").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_searched(searcher, paths, tmp_path):
    with pytest.raises(InputError, match="gallery is empty"):
        searcher.search(paths[0])
    with pytest.raises(InputError, match="gallery is empty"):
        searcher.save(tmp_path / "index")
    searcher.add(paths[:2])
    with pytest.raises(InputError, match="top 0"):
        searcher.search(paths[0], top=0)
    with pytest.raises(InputError, match="no images"):
        searcher.extract([])
    searcher.remove(["*"])
    with pytest.raises(InputError, match="gallery is empty"):
        searcher.search(paths[0])
    searcher.add(paths[:2])
    assert len(searcher.search(paths[0])[0]) == 2
