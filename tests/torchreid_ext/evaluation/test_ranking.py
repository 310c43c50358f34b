"""Rankings of a target: the scores are equal to torchreid's own, and the pictures are right."""

import re

import numpy as np
import pytest
import torch
import torchreid
from PIL import Image
from toy_data import make_image_manager, make_video_manager

from pml_drsl.checks import InputError
from pml_drsl.evaluation.scores import summarize
from torchreid_ext.engine.engines import ImageDRSLEngine, VideoDRSLEngine
from torchreid_ext.evaluation import ranking
from torchreid_ext.evaluation.page import Picture
from torchreid_ext.evaluation.ranking import Samples, Search, print_result, print_side_by_side


def samples(seed, size, pids=4, camids=3):
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(size, 6)).astype(np.float32))
    return Samples(features, rng.integers(0, pids, size), rng.integers(0, camids, size))


def pictures(letter, count):
    return [Picture(f"{letter}{index}") for index in range(count)]


def host_scores(query, gallery, distances, **kwargs):
    return torchreid.metrics.evaluate_rank(distances, query.pids, gallery.pids, query.camids, gallery.camids, **kwargs)


@pytest.mark.parametrize(
    ("metric", "normalize", "rerank"),
    [("euclidean", False, False), ("cosine", True, False), ("euclidean", True, True), ("cosine", False, True)],
)
def test_scores_are_equal_to_torchreids(metric, normalize, rerank):
    query, gallery = samples(0, 20), samples(1, 60)
    result = Search(query, gallery, metric, normalize, rerank).evaluate()

    def host_distances(x, y):
        if normalize:
            x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
        return torchreid.metrics.compute_distance_matrix(x, y, metric).numpy()

    q, g = query.features, gallery.features
    distances = host_distances(q, g)
    if rerank:
        distances = torchreid.utils.re_ranking(distances, host_distances(q, q), host_distances(g, g))
    cmc, mean_ap = host_scores(query, gallery, distances)
    # Re-ranked distances have many ties, whose order torchreid leaves to the sort.
    tolerance = 1e-2 if rerank else 1e-6
    assert result.mAP == pytest.approx(mean_ap, abs=tolerance)
    assert result.rank(1) == pytest.approx(cmc[0], abs=5 * tolerance)


def test_the_curve_reaches_the_largest_rank(tmp_path, monkeypatch):
    assert len(Search(samples(0, 20), samples(1, 120)).evaluate(max_rank=100).cmc) == 100
    manager = make_image_manager(tmp_path)
    model = torchreid.models.build_model("osnet_x0_25", manager.num_train_pids, loss="triplet", pretrained=False)
    engine = ImageDRSLEngine(manager, model, torch.optim.SGD(model.parameters(), lr=0.1), use_gpu=False)
    asked = []
    monkeypatch.setattr(ranking, "summarize", lambda ranked, most: asked.append(most) or summarize(ranked, most))
    engine.test(ranks=[1, 100])
    assert asked == [100]


def test_a_ranking_marks_junk_and_shows_topk_other_entries():
    query, gallery = samples(0, 5), samples(1, 40)
    search = Search(query, gallery)
    paths = pictures("q", 5), pictures("g", 40)
    for index in range(5):
        row = search.ranking(index, 7, paths)
        entries = [int(found.picture.path[1:]) for found in row.matches]
        distances = (gallery.features - query.features[index]).square().sum(1)
        assert entries == distances.argsort().tolist()[: len(entries)]
        same = [bool(gallery.pids[entry] == query.pids[index]) for entry in entries]
        same_camera = [bool(gallery.camids[entry] == query.camids[index]) for entry in entries]
        marks = [
            "wrong" if not person else "junk" if camera else "right"
            for person, camera in zip(same, same_camera, strict=True)
        ]
        assert [found.mark for found in row.matches] == marks and len(marks) - marks.count("junk") == 7
        np.testing.assert_allclose([found.distance for found in row.matches], distances[entries], rtol=1e-4)
    assert len(search.ranking(0, 1000, paths).matches) == 40


@pytest.mark.parametrize(
    ("make", "engine", "target"),
    [(make_image_manager, ImageDRSLEngine, "toy"), (make_video_manager, VideoDRSLEngine, "toy_video")],
)
def test_every_query_is_on_the_page_and_the_hardest_comes_first(tmp_path, monkeypatch, make, engine, target):
    manager = make(tmp_path)
    torch.manual_seed(0)
    model = torchreid.models.build_model(
        "osnet_x0_25", manager.num_train_pids, loss="triplet", pretrained=False, use_gpu=False
    )
    engine = engine(manager, model, torch.optim.SGD(model.parameters(), lr=0.1))
    # Each identity has the colours of two persons, so that the search makes mistakes.
    engine.parse_data_for_eval = lambda data: (data["img"], data["pid"] % 3, data["camid"])
    ranked, rank_queries = [], ranking.rank_queries
    monkeypatch.setattr(ranking, "rank_queries", lambda *a, **b: ranked.append(rank_queries(*a, **b)) or ranked[-1])
    engine.run(str(tmp_path / "log"), test_only=True, visrank=True, visrank_topk=3, picture=2)
    assert len(ranked) == 1
    with Image.open(tmp_path / "log" / f"ranking_{target}.png") as overview:
        overview.load()
    (page,) = (tmp_path / "log" / f"visrank_{target}").iterdir()
    text = page.read_text(encoding="utf-8")
    precision = [float(value) for value in re.findall(r"<h2.*AP ([\d.]+)%</h2>", text)]
    assert len(precision) == len(manager.test_dataset[target]["query"]) and precision == sorted(precision)
    # Also with drawn galleries, whose places are better, the page shows the whole gallery.
    engine.test(save_dir=str(tmp_path / "cuhk"), visrank=True, visrank_topk=3, use_metric_cuhk03=True)
    assert (tmp_path / "cuhk" / f"visrank_{target}" / page.name).read_text(encoding="utf-8") == text
    assert not torch.equal(ranked[1].first_places.mean(dim=1), ranked[0].first_places.mean(dim=1))
    # The numbers of torchreid are not the names of the identities.
    assert "identity 0" not in text and "-0.000" not in text and 'name="viewport"' in text


@pytest.mark.parametrize("options", [{"picture": 3}, {"visrank": True}, {"queries": True}])
def test_files_need_a_folder(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    manager = make_image_manager(tmp_path)
    model = torchreid.models.build_model("osnet_x0_25", manager.num_train_pids, loss="triplet", pretrained=False)
    engine = ImageDRSLEngine(manager, model, torch.optim.SGD(model.parameters(), lr=0.1), use_gpu=False)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="save_dir is '': give a folder"):
        engine.test(**options)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_image_of_nobody_is_neither_right_nor_wrong():
    query, gallery = samples(0, 1, pids=1), samples(1, 4)
    gallery.pids[:] = [-1, 0, 1, -1]
    gallery.camids[:] = 9
    row = Search(query, gallery).ranking(0, 4, (pictures("q", 1), pictures("g", 4)))
    assert {found.picture.path for found in row.matches if found.mark == "junk"} == {"g0", "g3"}


def test_images_of_nobody_do_not_take_part_in_re_ranking(tmp_path):
    query, gallery = samples(0, 20), samples(1, 60)
    query.pids[3], gallery.pids[10:30] = -1, -1
    query.camids[:], gallery.camids[:] = 0, 1
    known = [samples.at(np.flatnonzero(samples.pids != -1)) for samples in (query, gallery)]
    q, g = (samples.features for samples in known)
    host = torchreid.utils.re_ranking(*(torch.cdist(*pair).square().numpy() for pair in ((q, g), (q, q), (g, g))))
    search = Search(query, gallery, rerank=True)
    assert search.evaluate().mAP == pytest.approx(host_scores(*known, host)[1], abs=1e-2)
    assert search.evaluate().num_query == 19
    row = search.ranking(4, 60, (pictures("q", 20), pictures("g", 60)))
    assert row.query.path == "q4"
    assert [found.picture.path for found in row.matches] == [f"g{i + 20 * (i >= 10)}" for i in host[3].argsort()]
    # A query of nobody has a row without a score, as it has without re-ranking.
    for each in (search, Search(query, gallery)):
        precision = each.evaluate().ranked.average_precision
        assert len(precision) == 20 and precision.isnan().tolist() == (query.pids == -1).tolist()
    assert not search.ranking(3, 60, (pictures("q", 20), pictures("g", 60))).matches


def test_results_are_printed_in_torchreids_format(capsys):
    query, gallery = samples(0, 20), samples(1, 60)
    query.pids[3] = 99
    result = Search(query, gallery).evaluate()
    print_result(result, [1, 5])
    out = capsys.readouterr().out
    assert "20 queries, 1 of them left out" in out
    same = (query.pids[:, None] == gallery.pids) & (query.camids[:, None] == gallery.camids)
    assert f"; 60 gallery entries, {same.sum() / 20:.1f} left out per query (itself, or the same person" in out
    assert f"mAP: {result.mAP:.1%}" in out
    assert f"Rank-5  : {result.rank(5):.1%}" in out and "identity -1" not in out
    print_side_by_side({"untrained": {"toy": result}, "trained": {"toy": result}}, [1])
    rows = capsys.readouterr().out.splitlines()
    assert rows[1].split() == ["toy", "untrained", "trained"]
    assert rows[2].split() == ["mAP", *[f"{result.mAP:.1%}"] * 2]
