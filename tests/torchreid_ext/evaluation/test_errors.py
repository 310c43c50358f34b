"""The page of errors: its numbers agree with scikit-learn, and it is written for every kind of test set."""

import html
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_curve

from pml_drsl.checks import InputError
from pml_drsl.evaluation import distances
from torchreid_ext.evaluation.errors import STEPS, camera_pairs, count_distances, equal_error, prepare, write_page


@pytest.fixture
def data():
    """Thirty queries and ninety gallery images of twelve people and of nobody, from three cameras."""
    rng = np.random.default_rng(0)
    centers, made = rng.normal(size=(12, 6)), {}
    for side, size in (("query", 30), ("gallery", 90)):
        ids = rng.integers(0, 12, size)
        made |= {
            side: (centers[ids] + rng.normal(size=(size, 6))).astype(np.float32),
            f"{side}_cams": rng.integers(0, 3, size),
        }
        made[f"{side}_ids"] = np.where(rng.random(size) < 0.1, -1, ids)
    return made


def opened(data, paths=None, junk=(-1,)):
    names = [[f"{side}{row}.png" for row in range(len(data[side]))] for side in ("query", "gallery")]
    return prepare(data, paths or names, "euclidean", junk)


def known_pairs(data):
    """Distances, whether a match, and whether it counts, of all pairs: three arrays [Q, M]."""
    apart = np.square(data["query"][:, None] - data["gallery"].astype(float)).sum(axis=2)
    same = data["query_ids"][:, None] == data["gallery_ids"]
    junk = (data["gallery_ids"] == -1) | (data["query_ids"][:, None] == -1)
    return apart, same, ~(junk | (same & (data["query_cams"][:, None] == data["gallery_cams"])))


def test_the_point_of_equal_error_is_that_of_scikit_learn(data, monkeypatch):
    edges, positive, negative = counts = count_distances(opened(data)[0])
    apart, same, valid = known_pairs(data)
    assert positive.sum() == (same & valid).sum() and negative.sum() == (~same & valid).sum()
    accepted, found, thresholds = roc_curve(same[valid], -apart[valid], drop_intermediate=False)
    place = np.abs(1 - found - accepted).argmin()
    rate, threshold = equal_error(*counts)
    # A threshold between two distances has the same rates.
    assert rate == pytest.approx((1 - found[place] + accepted[place]) / 2, abs=1 / same[valid].sum())
    assert threshold == pytest.approx(-thresholds[place], abs=0.5) and len(positive) == STEPS == len(edges) - 1
    monkeypatch.setattr(distances, "ELEMENTS_PER_CHUNK", 300)
    parts = count_distances(opened(data)[0])
    assert all(map(np.array_equal, parts, counts))


def test_camera_pairs_have_the_scores_of_scikit_learn_in_the_gallery_of_one_camera(data):
    apart, same, valid = known_pairs(data)
    expected = {}
    for query, gallery in np.ndindex(3, 3):
        rows = np.flatnonzero(data["query_cams"] == query)
        searched = [valid[row] & (data["gallery_cams"] == gallery) for row in rows]
        scores = [
            average_precision_score(same[row][part], -apart[row][part])
            for row, part in zip(rows, searched, strict=True)
            if same[row][part].any()
        ]
        if scores:
            expected[query, gallery] = (np.mean(scores), len(scores))
    pairs = camera_pairs(opened(data)[0])
    assert set(pairs) == set(expected) and len(pairs) == 6  # A match is from another camera.
    for pair, (score, count) in expected.items():
        assert pairs[pair] == (pytest.approx(score, abs=1e-6), count)


def test_the_hardest_query_comes_first_with_what_came_before_its_first_match(data, tmp_path):
    caption = write_page(tmp_path / "e.html", *opened(data), "Title")
    text = (tmp_path / "e.html").read_text(encoding="utf-8")
    apart, same, valid = known_pairs(data)
    expected = []
    for row in range(30):
        order = apart[row].argsort()
        order = order[valid[row][order]]
        if same[row][order].any():
            score = average_precision_score(same[row][order], -apart[row][order])
            expected.append((score, f"query{row}.png", int(same[row][order].argmax()) + 1))
    expected.sort()
    heads = re.findall(r"<h2 [^>]*>(.*) - first match at rank (\d+), AP (.*)%</h2>", text)
    assert [(name, int(rank)) for name, rank, _ in heads] == [(name, rank) for _, name, rank in expected]
    assert [float(score) for *_, score in heads] == pytest.approx([100 * score for score, *_ in expected], abs=0.051)
    late = [(name, rank) for _, name, rank in expected if rank > 10]
    assert late  # The first match is shown, where it is not among the ten nearest.
    for name, rank in late:
        (section,) = (part for part in text.split("<section")[1:] if f">{name} - " in part)
        last = re.findall(r'<button type="button" class="card (\w+)" aria-label="rank (\d+),', section)[-1]
        assert last == ("right", str(rank)) and section.count('class="card wrong"') == 10
    mean = np.mean([score for score, *_ in expected])
    assert f"mAP {mean:.1%}" in caption and "query29" in text and "images cannot be found" in caption
    # The figures have the words of their captions, and one for each kind of paper.
    assert (
        len(re.findall(r'alt="(Distances|Map): [^"]{40,}"', text))
        == 2
        == text.count('prefers-color-scheme: dark)" srcset')
    )
    assert "default-src 'none'" in text and not re.search(r'(src|href|srcset)="(?!data:image)', text)


def named_cameras(data):
    return {name: np.char.add("<c>", data[name].astype(str)) for name in ("query_cams", "gallery_cams")}


CHANGES = {
    "many cameras": (lambda data: {"gallery_cams": np.arange(90) + 3}, r"\d\d cameras are too many"),
    "eleven cameras": (
        lambda data: {"query_cams": data["query_cams"].astype(str), "gallery_cams": (np.arange(90) % 11).astype(str)},
        '"col">9</th><th scope="col">10</th>',
    ),
    "names": (named_cameras, '<th scope="col">&lt;c&gt;2</th>'),
    "four queries": (lambda data: {name: data[name][:4] for name in data if "query" in name}, "The 4 hardest of 4"),
    "one dimension": (lambda data: {side: data[side][:, :1] for side in ("query", "gallery")}, "hold 100%"),
    "equal features": (lambda data: {side: 0 * data[side] for side in ("query", "gallery")}, "hold 0%"),
    "some without a match": (lambda data: {"query_ids": np.r_[[99] * 5, data["query_ids"][5:]]}, "no match in the"),
    "no cameras": (lambda data: {}, "have no cameras"),
    "None for cameras": (lambda data: {"query_cams": None, "gallery_cams": None}, "have no cameras"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_test_set_has_its_page(data, tmp_path, name):
    change, words = CHANGES[name]
    data |= change(data)
    data = {key: data[key] for key in data if name != "no cameras" or "cams" not in key}
    write_page(tmp_path / "e.html", *opened(data), "Title")
    text = (tmp_path / "e.html").read_text(encoding="utf-8")
    assert re.search(words, text) and "nan%" not in text and "identity -1" not in text and text.count("<figure>") == 3


@pytest.mark.parametrize("known", [0, 20])
def test_a_camera_that_is_not_known_has_no_name(data, tmp_path, known):
    """drsl-extract gives such an image its path in place of a camera; of the others there is a table."""
    paths = [[f"/x/{side}{row}.png" for row in range(len(data[side]))] for side in ("query", "gallery")]
    for side, files in zip(("query", "gallery"), paths, strict=True):
        data[f"{side}_cams"] = np.r_[data[f"{side}_cams"][:known].astype(str), files[known:]]
    write_page(tmp_path / "e.html", *opened(data, paths), "Title")
    text = (tmp_path / "e.html").read_text(encoding="utf-8")
    assert "camera /" not in text and "/x/" in text
    heads = re.findall(r'<th scope="col">(.*?)</th>', text)
    assert heads == ["0", "1", "2"][: 3 * bool(known)] and ("have no cameras" in text) is not bool(known)


@pytest.mark.filterwarnings("error")
def test_the_legend_of_the_map_has_every_name_as_it_is(data, tmp_path):
    """Also those that matplotlib has no letters for, or that are mathematics to it, or nothing that it shows."""
    for side in ("query", "gallery"):
        data[f"{side}_ids"] = np.char.add("_$x$ 张伟 <b> ", data[f"{side}_ids"].astype(str))
    search, pictures = opened(data)
    write_page(tmp_path / "e.html", search, pictures, "Title")
    (legend,) = re.findall("<ul.*?</ul>", (tmp_path / "e.html").read_text(encoding="utf-8"))
    found = re.findall(r'<li><span style="color: (\S+)">(\S)</span> (\d+)% <bdi>(.*?)</bdi></li>', legend)
    precision = search.evaluate().ranked.average_precision.numpy()
    means = {pid: np.nanmean(precision[data["query_ids"] == pid]) for pid in np.unique(data["query_ids"])}
    means = sorted((100 * mean, pid) for pid, mean in means.items() if not np.isnan(mean))[:10]
    assert [html.unescape(name) for *_, name in found] == [pid for _, pid in means]
    assert [int(share) for *_, share, _ in found] == pytest.approx([mean for mean, _ in means], abs=0.51)
    assert len({colour for colour, *_ in found}) == len({sign for _, sign, *_ in found}) == 10


def test_images_that_are_gone_are_counted_and_the_others_are_shown(data, tmp_path):
    paths = [[str(tmp_path / f"{side}{row}.png") for row in range(len(data[side]))] for side in ("query", "gallery")]
    for path in (path for side in paths for path in side):
        Image.new("RGB", (4, 8)).save(path)
    assert "cannot be found" not in write_page(tmp_path / "e.html", *opened(data, paths), "Title")
    (tmp_path / "query0.png").unlink()
    assert re.search(
        r"\. 1 of the \d+ images cannot be found$", write_page(tmp_path / "e.html", *opened(data, paths), "T")
    )
    assert (tmp_path / "e.html").read_text(encoding="utf-8").count("the picture cannot be read") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query_cams": np.zeros(30, int), "gallery_cams": np.zeros(90, int)}, "another camera than its query"),
        ({"query_cams": np.zeros(2, int)}, "query_cams have shape"),
        ({"gallery_cams": None}, "query_cams without gallery_cams: give both"),
        ({"query_ids": np.full(30, 99)}, "no query identity occurs"),
    ],
)
def test_bad_input_is_refused_before_a_page_is_there(data, tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        write_page(tmp_path / "e.html", *opened(data | change), "Title")
    assert not list(tmp_path.iterdir())
