"""The search in Python finds what torch finds, by several threads at once, and knows each image once."""

import os
import threading
import time

import numpy as np
import pytest
import torch
import trained
from PIL import Image

from pml_drsl.checks import InputError
from pml_drsl.evaluation import reranking
from torchreid_ext import Searcher
from torchreid_ext.images import Row
from torchreid_ext.runtime.files import locked
from torchreid_ext.search.searcher import Match, others
from torchreid_ext.search.sources import absolute


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trained.train(tmp_path_factory.mktemp("run"), **{"model.bnneck": True})


@pytest.fixture(scope="module")
def paths(model):
    return sorted(map(str, (model.parents[2] / "images").glob("*.png")))


@pytest.fixture
def searcher(model):
    return Searcher(model, device="cpu")


def test_the_ranking_is_that_of_the_features(searcher, model, paths):
    searcher.add(paths[8:])
    features = searcher.extract(paths)
    assert (Searcher(model, device="cpu", batch_size=3).extract(paths) - features).abs().max() < 1e-5
    distances = 1 - torch.cosine_similarity(features[:8, None].double(), features[None, 8:].double(), dim=2)
    reranked = reranking.rerank(features[:8], features[8:], metric="cosine").rows(0, 8)
    rows = searcher.search(paths[:8], top=5), searcher.search(paths[:8], top=40, rerank=True)
    for row, again, expected, expected_again in zip(*rows, distances, reranked, strict=True):
        assert [match.rank for match in row] == [1, 2, 3, 4, 5] and len(again) == len(paths) - 8 == len(searcher)
        assert np.allclose([match.distance for match in row], expected.sort().values[:5], atol=1e-6)
        assert np.allclose([match.distance for match in again], expected_again.sort().values, atol=1e-5)
        for match in row:
            assert abs(expected[paths[8:].index(match.name)] - match.distance) < 1e-6


def test_names_carry_identity_and_camera_where_the_user_says_so(searcher, model, paths, monkeypatch):
    picture = Image.open(paths[0])
    names = ["Zoë/hall_1.png", "0002_c3s1_000451_03.jpg", "Downloads/IMG_2034.jpg"]
    searcher.add([picture, np.array(picture), picture], names)
    found = searcher.search(picture)[0]
    assert {(m.identity, m.camera) for m in found} == {("0002", "3"), ("", "")} and abs(found[0].distance) < 1e-6
    by_folder = Searcher(model, device="cpu", names="folder")
    by_folder.add(picture, names[:1])
    assert by_folder.search(picture)[0][0].identity == "Zoë"
    # The folders above a file may name a person; a name that was given is all there is.
    monkeypatch.chdir(os.path.dirname(paths[0]))
    by_folder.add(picture, "1.jpg")
    by_folder.add(os.path.basename(paths[0]))
    assert {(m.name, m.identity) for m in by_folder.search(picture)[0][:3]} == {
        ("Zoë/hall_1.png", "Zoë"),
        ("1.jpg", ""),
        (paths[0], "images"),
    }
    with pytest.raises(InputError, match="need names"):
        searcher.add(picture)
    for names in (["a", "b"], []):
        with pytest.raises(InputError, match=f"1 images need as many names, got {len(names)}"):
            searcher.add(picture, names)


def test_an_image_is_known_by_its_resolved_path(searcher, model, paths, tmp_path, monkeypatch):
    """However it is given: from another folder, or through a link."""
    folder = os.path.dirname(paths[0])
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    name = os.path.basename(paths[0])
    searcher.add(name)
    for again in (paths[0], f"./{name}", str(tmp_path / "link" / name)):
        with pytest.raises(InputError, match="is in the gallery already"):
            searcher.add(again)
    assert searcher.search(name)[0][0].name == paths[0]
    searcher.save(tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    opened = Searcher(model, index=tmp_path / "index", device="cpu")
    assert opened.search(paths[0])[0][0].name == paths[0]
    assert opened.remove(f"link/{name}") == 1 and len(opened) == 0


def test_a_link_does_not_find_its_own_photo(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "me.jpg").symlink_to(tmp_path / "b.jpg")
    (tmp_path / "B.JPG").hardlink_to(tmp_path / "b.jpg")  # as where two names of other case are one file
    names = ("b.jpg", "a.jpg", "me.jpg", "B.JPG")
    found = [Match(rank, str(tmp_path / name), 0.1 * rank) for rank, name in enumerate(names, 1)]
    for query in ("me.jpg", "b.jpg"):
        (kept,) = others([absolute(Row(str(tmp_path / query)))], [found], 5)
        assert [(match.rank, match.name) for match in kept] == [(1, str(tmp_path / "a.jpg"))]


def test_one_name_is_one_name_and_not_its_letters(searcher, paths):
    searcher.add([Image.open(path) for path in paths[:5]], ["n", "o", "p", "e", "s"])
    for wrong, words in [("nope", "matches 'nope'"), ("**", "matches all 5 images")]:
        with pytest.raises(InputError, match=words):
            searcher.remove(wrong)
    assert len(searcher) == 5 and searcher.remove("n") == 1 and searcher.remove(["o", "p"]) == 2
    assert searcher.prune() == 0  # names are no files


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


def test_what_cannot_be_used_changes_nothing(searcher, model, paths):
    with pytest.raises(InputError, match="gallery is empty"):
        searcher.search(paths[0])
    with pytest.raises(InputError, match="no images"):
        searcher.extract([])
    for options, words in (
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 2.5}, r"batch_size 2\.5: give a whole number"),
        ({"names": "folderr"}, "names 'folderr'"),
        ({"device": "gpu"}, "device 'gpu' is none of torch's"),
    ):
        with pytest.raises(InputError, match=words):
            Searcher(model, **options)
    searcher.add(paths[:2])
    before = searcher.search(paths[20])
    with pytest.raises(InputError, match=r"nowhere\.png"):
        searcher.add([paths[15], "nowhere.png"])
    with pytest.raises(InputError, match="top 0"):
        searcher.search(paths[0], top=0)
    for features in (searcher.extract(paths[0])[0], np.array([["a"]])):
        with pytest.raises(InputError, match="query features"):
            searcher.search_features(features)
    assert searcher.search(paths[20]) == before


def test_a_search_does_not_wait_for_a_file_that_another_process_writes(searcher, paths, tmp_path):
    searcher.add(paths[:4])
    with locked(tmp_path / "index"):
        saving = threading.Thread(target=searcher.save, args=(tmp_path / "index",), daemon=True)
        saving.start()
        time.sleep(0.2)
        searching = threading.Thread(target=searcher.search_features, args=(searcher.extract(paths[0]),), daemon=True)
        searching.start()
        searching.join(30)
        assert saving.is_alive() and not searching.is_alive()
    saving.join(30)
    assert (tmp_path / "index").is_file()
