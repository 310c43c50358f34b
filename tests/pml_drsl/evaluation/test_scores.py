"""Evaluation against a slow loop over the protocol's definition, torchreid's function and scikit-learn's."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from pml_drsl.evaluation import distances as distance_rows
from pml_drsl.evaluation import reranking
from pml_drsl.evaluation.ranking import SCORES
from pml_drsl.evaluation.scores import FeatureDistances, evaluate, rank_queries, summarize


def slow_scores(
    distances: list[list[float]],
    query_ids: list[int],
    gallery_ids: list[int],
    query_cams: list[int] | None,
    gallery_cams: list[int] | None,
    ties: str,
    max_rank: int,
) -> dict[str, Any] | None:
    """The protocol, one query and one gallery entry at a time. None if no query has a match."""
    aps, inps, curves, junk, unmatched = [], [], [], 0, 0
    num_gallery = sum(identity != -1 for identity in gallery_ids)
    for q, row in enumerate(distances):
        if query_ids[q] == -1:
            continue
        positives, negatives = [], []
        for g, distance in enumerate(row):
            if gallery_ids[g] == -1:
                continue
            if gallery_ids[g] != query_ids[q]:
                negatives.append(distance)
            elif query_cams is not None and gallery_cams is not None and gallery_cams[g] == query_cams[q]:
                junk += 1
            else:
                positives.append(distance)
        if not positives:
            unmatched += 1
            continue
        places = {}
        for policy, first in (("optimistic", True), ("pessimistic", False)):
            ranked = sorted(
                [(d, first is False, True) for d in positives] + [(d, first is True, False) for d in negatives]
            )
            places[policy] = [place for place, (_, _, is_match) in enumerate(ranked, start=1) if is_match]
        if ties == "mean":
            precisions, negatives_before = [], []
            for d in positives:
                r = 0.5 + sum(1.0 if p < d else 0.5 if p == d else 0.0 for p in positives)
                n = sum(1.0 if x < d else 0.5 if x == d else 0.0 for x in negatives)
                precisions.append(r / (r + n))
                negatives_before.append(n)
            inps.append(len(positives) / (len(positives) + max(negatives_before)))
        else:
            precisions = [i / place for i, place in enumerate(places[ties], start=1)]
            inps.append(len(positives) / places[ties][-1])
        aps.append(sum(precisions) / len(positives))
        first_places = [places[policy][0] for policy in (places if ties == "mean" else [ties])]
        curves.append([sum(p <= k for p in first_places) / len(first_places) for k in range(1, max_rank + 1)])
    if not aps:
        return None
    return {
        "mAP": sum(aps) / len(aps),
        "mINP": sum(inps) / len(inps),
        "cmc": [sum(column) / len(column) for column in zip(*curves, strict=True)][:num_gallery],
        "num_query": sum(identity != -1 for identity in query_ids),
        "num_gallery": num_gallery,
        "num_junk": junk,
        "num_unmatched": unmatched,
    }


@st.composite
def searches(draw: st.DrawFn) -> dict[str, Any]:
    """Small searches with many ties: features on a grid of integers, whose distances are exact."""
    num_query, num_gallery = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    identity, camera, coordinate = st.integers(-1, 3), st.integers(0, 2), st.integers(-2, 2)

    def column(values: st.SearchStrategy[int], n: int) -> list[int]:
        return draw(st.lists(values, min_size=n, max_size=n))

    search = {
        "query": [column(coordinate, 2) for _ in range(num_query)],
        "gallery": [column(coordinate, 2) for _ in range(num_gallery)],
        "query_ids": column(identity, num_query),
        "gallery_ids": column(identity, num_gallery),
        "query_cams": None,
        "gallery_cams": None,
    }
    if draw(st.booleans()):
        search |= {"query_cams": column(camera, num_query), "gallery_cams": column(camera, num_gallery)}
    return search


@settings(max_examples=200, deadline=None)
@given(
    search=searches(),
    ties=st.sampled_from(["mean", "optimistic", "pessimistic"]),
    max_rank=st.integers(1, 15),
    elements=st.sampled_from([distance_rows.ELEMENTS_PER_CHUNK, 1, 24]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_equals_the_slow_loop(
    search: dict[str, Any], ties: Any, max_rank: int, elements: int, dtype: torch.dtype
) -> None:
    labels = {key: search[key] for key in ("query_ids", "gallery_ids", "query_cams", "gallery_cams")}
    distances = [
        [sum((a - b) ** 2 for a, b in zip(q, g, strict=True)) for g in search["gallery"]] for q in search["query"]
    ]
    expected = slow_scores(distances, *labels.values(), ties, max_rank)
    options = {"ties": ties, "max_rank": max_rank}
    query, gallery = torch.tensor(search["query"], dtype=dtype), torch.tensor(search["gallery"], dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distance_rows, "ELEMENTS_PER_CHUNK", elements)
        if expected is None:
            with pytest.raises(ValueError, match=r"has a match|have a junk identity"):
                evaluate(query, gallery, **labels, **options)
            return
        actual = evaluate(query, gallery, **labels, **options).to_dict()
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, abs=1e-12), key
    json.dumps(actual)


def numbers(**evaluation: Any) -> list[float]:
    """All numbers of an evaluation in one list, which ``pytest.approx`` compares."""
    scores = evaluate(**evaluation).to_dict()
    return [*scores.pop("cmc"), *scores.values()]


def random_search(num_query: int = 40, num_gallery: int = 150, dim: int = 16, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    return {
        "query": torch.randn(num_query, dim, generator=generator),
        "gallery": torch.randn(num_gallery, dim, generator=generator),
        "query_ids": rng.integers(0, 12, num_query),
        "gallery_ids": rng.integers(0, 12, num_gallery),
        "query_cams": rng.integers(0, 3, num_query),
        "gallery_cams": rng.integers(0, 3, num_gallery),
    }


def host_scores(search: dict[str, Any], metric: str, **kwargs: Any) -> tuple[Any, float]:
    torchreid = pytest.importorskip("torchreid")
    distances = torchreid.metrics.compute_distance_matrix(search["query"], search["gallery"], metric).numpy()
    labels = [search[key] for key in ("query_ids", "gallery_ids", "query_cams", "gallery_cams")]
    cmc, mean_ap = torchreid.metrics.evaluate_rank(distances, *labels, use_cython=False, **kwargs)
    return cmc, mean_ap


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equals_torchreid(metric: Any) -> None:
    search = random_search()
    cmc, mean_ap = host_scores(search, metric, max_rank=20)
    result = evaluate(**search, metric=metric, max_rank=20)
    assert result.mAP == pytest.approx(mean_ap, abs=1e-6)
    np.testing.assert_allclose(result.cmc, cmc, atol=1e-6)


def test_equals_scikit_learn_without_cameras() -> None:
    search = random_search()
    del search["query_cams"], search["gallery_cams"]
    distances = torch.cdist(search["query"].double(), search["gallery"].double()).numpy()
    expected = [
        average_precision_score(search["gallery_ids"] == identity, -row)
        for identity, row in zip(search["query_ids"], distances, strict=True)
    ]
    assert evaluate(**search).mAP == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize(("dtype", "as_array"), [(torch.float16, True), (torch.float64, False)])
def test_types_of_features_and_labels(dtype: torch.dtype, as_array: bool) -> None:
    search = random_search()
    half = {key: search[key].half() for key in ("query", "gallery")}
    expected = numbers(**(search | {key: value.float() for key, value in half.items()}))
    typed: dict[str, Any] = {key: value.to(dtype) for key, value in half.items()}
    if as_array:
        typed = {key: value.numpy() for key, value in typed.items()}
    else:
        typed["query_ids"] = torch.from_numpy(search["query_ids"])
        typed["gallery_cams"] = search["gallery_cams"].tolist()
    typed["query_cams"] = search["query_cams"].astype(np.uint8)
    assert numbers(**(search | typed)) == pytest.approx(expected)


def test_string_labels() -> None:
    search = random_search()
    named = {key: [f"name {value}" for value in search[key]] for key in search if key.endswith(("ids", "cams"))}
    assert numbers(**(search | named)) == numbers(**search)
    # A column of strings, or of integers, in older releases of pandas.
    for of in (named, {key: search[key].tolist() for key in named}):
        columns = {key: np.array(values, dtype=object) for key, values in of.items()}
        assert numbers(**(search | columns)) == numbers(**search)


def test_a_query_that_finds_itself_is_warned_of() -> None:
    search = random_search(40, 40)
    both = search["query"], search["query"].clone(), search["query_ids"], search["query_ids"]
    with pytest.warns(UserWarning, match=r"every query finds itself first; to leave it out, give range\(N\)"):
        assert evaluate(*both).cmc[0] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = evaluate(*both, range(40), range(40))
        evaluate(search["query"], search["gallery"], search["query_ids"], search["gallery_ids"])
    apart = torch.cdist(both[0], both[0]).fill_diagonal_(math.inf)
    found, has_match = both[2] == both[2][apart.argmin(1)], [(both[2] == each).sum() > 1 for each in both[2]]
    assert alone.cmc[0] == pytest.approx(found[has_match].mean())


def test_arrays_may_be_reversed() -> None:
    search = random_search()
    arrays = {key: np.asarray(value)[::-1] for key, value in search.items()}
    assert numbers(**arrays) == pytest.approx(numbers(**search))


def test_junk_counts_nowhere_and_distractors_are_wrong_answers() -> None:
    query, gallery = torch.tensor([[0.0], [9.0]]), torch.tensor([[1.0], [0.5], [9.0], [8.9]])

    def mean_ap(query_ids: Any, gallery_ids: Any, **options: Any) -> float:
        return evaluate(query, gallery, query_ids, gallery_ids, **options).mAP

    assert mean_ap([1, 2], [1, -1, 2, -1]) == 1
    assert mean_ap(["1", "2"], ["1", "-1", "2", "-1"]) == 1
    assert mean_ap([1, 2], [1, 0, 2, 0]) == mean_ap([1, 2], [1, -1, 2, -1], junk=()) == 0.75
    assert mean_ap([1, 2], [1, 0, 2, 7], junk=("0", 7)) == 1
    assert mean_ap(["a", "b"], ["a", "background", "b", "-1"], junk=["background", -1]) == 1
    assert mean_ap([1, -1], [1, -1, 2, -1]) == 1
    for junk, message in (((0, "nobody"), "integers"), ("-1", "list")):
        with pytest.raises(ValueError, match=message):
            mean_ap([1, 2], [1, 0, 2, 7], junk=junk)
    for options in ({}, {"rerank": True}):
        with pytest.raises(ValueError, match=r"all quer.* have a junk identity.* \(drsl-evaluate --junk\)"):
            mean_ap([-1, -1], [-1, -1, 2, 1], **options)
        with pytest.raises(ValueError, match="all gallery images have a junk identity"):
            mean_ap([1, 2], [-1] * 4, **options)


@pytest.mark.parametrize(
    ("options", "sides", "as_text"),
    [
        ({}, ("query", "gallery"), False),
        ({"rerank": True}, ("query", "gallery"), True),
        ({"protocol": "single-gallery-shot"}, ("gallery",), False),  # A query shifts the draws.
    ],
)
def test_junk_images_change_no_figure(
    options: dict[str, Any], sides: tuple[str, ...], as_text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distance_rows, "ELEMENTS_PER_CHUNK", 7 * 180)
    search = random_search()
    expected = numbers(**search, **options)
    rng = np.random.default_rng(1)
    for side in sides:
        size, number = len(search[side]), 30
        is_junk = rng.permutation(size + number) < number  # The real images keep their order.
        rows = rng.integers(0, size, size + number)  # Copies of real images would be the nearest of all.
        rows[~is_junk] = np.arange(size)
        ids = np.where(is_junk, -1, search[f"{side}_ids"][rows])
        search[side], search[f"{side}_cams"] = search[side][rows], search[f"{side}_cams"][rows]
        search[f"{side}_ids"] = ids.astype(str) if as_text else ids
    if as_text:
        search |= {key: search[key].astype(str) for key in ("query_cams", "gallery_cams")}
    assert numbers(**search, **options) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("rerank", [False, True])
def test_features_far_from_zero_keep_their_ranking(metric: Any, rerank: bool) -> None:
    search = random_search(num_gallery=400, dim=32)
    centers = torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    offset = 3000 * direction / direction.norm() * 32**0.5
    for side in ("query", "gallery"):
        search[side] = search[side] + 0.5 * centers[search[f"{side}_ids"]] + offset  # float32 from here on
    exact = search | {side: search[side].double() for side in ("query", "gallery")}
    expected = evaluate(**exact, metric=metric, rerank=rerank)
    assert evaluate(**search, metric=metric, rerank=rerank).mAP == pytest.approx(expected.mAP, abs=2e-3)
    assert expected.mAP > 0.2


def test_one_very_long_gallery_feature_takes_no_digits_from_the_others() -> None:
    search = random_search(num_gallery=20, dim=32) | {"query_cams": None, "gallery_cams": None}
    search["gallery"][0, 0] = 1e7
    exact = search | {side: search[side].double() for side in ("query", "gallery")}
    assert evaluate(**search).mAP == pytest.approx(evaluate(**exact).mAP, abs=1e-6)


def test_zero_vectors_have_cosine_distance_1_wherever_the_others_are() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.cat([torch.zeros(1, 8), 5 + torch.randn(3, 8, generator=generator)])
    gallery = torch.cat([5 + torch.randn(6, 8, generator=generator), torch.zeros(1, 8)])
    expected = 1 - torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(gallery).T
    distances = FeatureDistances(query, gallery, "cosine")
    torch.testing.assert_close(distances.distances(0, 4), expected, atol=1e-6, rtol=0)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(7))
    torch.testing.assert_close(distances.of_pairs(*pairs.T), expected.flatten(), atol=1e-6, rtol=0)


def test_a_new_score_is_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, "share-junk", lambda ranked: ranked.num_junk / ranked.num_gallery)
    result = evaluate(**random_search())
    expected = float(result.ranked.num_junk[result.ranked.matched].double().mean()) / 150
    assert result.scores(ranks=(1,)).keys() == {"mAP", "mINP", "share-junk", "rank-1"}
    assert result.scores()["share-junk"] == result.to_dict()["share-junk"] == pytest.approx(expected)


def test_the_same_arguments_give_the_same_scores() -> None:
    search = random_search()
    scores = evaluate(**search).to_dict()
    assert scores == evaluate(**search).to_dict() != evaluate(**search, metric="cosine").to_dict()


def test_results_hold_arrays_and_are_told_apart_by_identity() -> None:
    one, other = (evaluate(**random_search()) for _ in range(2))
    assert one != other and one.ranked != other.ranked
    assert len({one, other}) == len({one.ranked, other.ranked}) == 2


def test_average_precision_and_identity_of_each_query() -> None:
    search = random_search()
    ranked = evaluate(**search).ranked
    assert ranked.identities.tolist() == search["query_ids"].tolist()
    for q in (0, 7, 39):
        alone = search | {key: search[key][q : q + 1] for key in ("query", "query_ids", "query_cams")}
        assert float(ranked.average_precision[q]) == pytest.approx(evaluate(**alone).mAP)


def test_queries_of_junk_keep_their_rows() -> None:
    search = random_search()
    real = np.arange(40) % 4 != 0
    alone = search | {key: search[key][real] for key in ("query", "query_ids", "query_cams")}
    search["query_ids"] = np.where(real, search["query_ids"], -1)
    for options in ({}, {"rerank": True}):
        expected, ranked = evaluate(**alone, **options), evaluate(**search, **options).ranked
        assert (
            ranked.is_junk.tolist() == (~real).tolist() and ranked.identities.tolist() == search["query_ids"].tolist()
        )
        for name in ("average_precision", "inverse_negative_penalty", "first_places", "num_positives", "num_junk"):
            torch.testing.assert_close(getattr(ranked, name)[real], getattr(expected.ranked, name), equal_nan=True)
        assert ranked.average_precision[~real].isnan().all() and ranked.first_places[~real].isinf().all()
        assert not ranked.matched[~real].any()


@pytest.mark.parametrize("protocol", ["standard", "single-gallery-shot"])
def test_chunks_do_not_matter(protocol: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    search = random_search()
    search |= {key: search[key].mul(8).round() for key in ("query", "gallery")}  # exact products
    results = [numbers(**search, protocol=protocol)]
    for queries in (1, 7, 39):
        monkeypatch.setattr(distance_rows, "ELEMENTS_PER_CHUNK", queries * 150)
        results.append(numbers(**search, protocol=protocol))
    assert all(result == pytest.approx(results[0], abs=1e-12) for result in results)


def test_copies_tie_whatever_the_matrix_product_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.addmm  # Whether it rounds equal columns differently depends on the machine.
    monkeypatch.setattr(torch, "addmm", lambda *a, **b: (exact := product(*a, **b)) + 1e-5 * torch.rand(exact.shape))
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(5, 333, generator=generator)
    gallery = base.repeat(41, 1)  # each entry 41 times: in every place of the product's blocks
    query = torch.randn(9, 333, generator=generator)
    for metric in ("euclidean", "cosine"):
        rows = FeatureDistances(query, gallery, metric).rows(0, 9)  # type: ignore[arg-type]
        assert torch.equal(rows, rows[:, :5].repeat(1, 41))
    ids = torch.arange(len(gallery)) // 5  # identity 0 has one copy of each
    scores = {ties: evaluate(query, gallery, [0] * 9, ids, ties=ties) for ties in ("optimistic", "pessimistic")}  # type: ignore[arg-type]
    assert scores["optimistic"].rank(1) == 1
    assert scores["pessimistic"].rank(40) == 0


def test_ties_by_hand() -> None:
    query, gallery, ids = torch.zeros(1, 1), torch.ones(3, 1), [1, 1, 0]  # two matches, one negative, all tied
    by_policy = {ties: evaluate(query, gallery, [1], ids, ties=ties) for ties in ("optimistic", "mean", "pessimistic")}  # type: ignore[arg-type]
    assert [result.mAP for result in by_policy.values()] == pytest.approx([1, 1.5 / 2, (1 / 2 + 2 / 3) / 2])
    assert [result.mINP for result in by_policy.values()] == pytest.approx([1, 2 / 2.5, 2 / 3])
    assert [list(result.cmc) for result in by_policy.values()] == [[1, 1, 1], [0.5, 1, 1], [0, 1, 1]]


def test_the_curve_is_the_mean_of_those_of_the_queries_with_a_match() -> None:
    for options in OPTIONS:
        search = random_search()
        search["query_ids"][0] = 999  # Nobody in the gallery.
        result = evaluate(**search, max_rank=200, **options)
        assert result.num_unmatched > 0
        curves = result.ranked.hits(200)[result.ranked.matched]
        np.testing.assert_allclose(result.cmc, curves.mean(dim=0), rtol=1e-12)


def test_small_gallery_and_rank_by_name() -> None:
    result = evaluate(torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0]]), [7], [8, 7])
    assert list(result.cmc) == [0, 1]
    assert (result.rank(1), result.rank(2), result.rank(20)) == (0, 1, 1)
    result = evaluate(torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0]]), [7], [8, 7], max_rank=1)
    for k in (0, 2):
        with pytest.raises(ValueError, match="max_rank"):
            result.rank(k)


def test_unmatched_queries_are_counted_and_left_out() -> None:
    search = random_search()
    alone = evaluate(**search)
    search["query"] = torch.cat([search["query"], torch.zeros(2, 16)])
    search["query_ids"] = np.append(search["query_ids"], [99, 98])
    search["query_cams"] = np.append(search["query_cams"], [0, 1])
    more = evaluate(**search)
    assert (more.num_unmatched, more.num_query) == (alone.num_unmatched + 2, 42)
    assert more.mAP == pytest.approx(alone.mAP, abs=1e-9)
    ranked = rank_queries(
        FeatureDistances(search["query"], search["gallery"]),
        *(search[key] for key in ("query_ids", "gallery_ids", "query_cams", "gallery_cams")),
    )
    assert ranked.average_precision.isnan().tolist() == (~ranked.matched).tolist()
    assert summarize(ranked).mAP == more.mAP


def test_errors_name_the_value_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    search = random_search()
    same_camera = {"query_cams": np.zeros(40, int), "gallery_cams": np.zeros(150, int)}
    spoilt = search["gallery"].clone()
    spoilt[[3, 5], 0] = torch.tensor([torch.nan, torch.inf])
    cases: list[tuple[dict[str, Any], str]] = [
        (same_camera, "from another camera .*leave both out .drsl-evaluate --no-cameras"),
        ({"query_ids": np.full(40, 99)}, "no query identity occurs in the gallery"),
        ({"gallery": spoilt}, "2 of 150 gallery features contain NaN or infinity .first: row 3"),
        ({"query": search["query"] * 1e20}, "overflow"),
        (
            {"query": search["query"] * 1e-25},
            "query features reach .*e-25, whose squares are 0 in torch.float32",
        ),
        ({"gallery": search["gallery"] * 1e-25, "metric": "cosine"}, "gallery features reach .* whose squares are 0"),
        ({"query": search["query"][:, :8]}, "8 dimensions and gallery features 16"),
        ({"query": search["query"][:0]}, "non-empty"),
        ({"query": search["query"][0]}, "shape"),
        ({"query": search["query"].long()}, "floating"),
        ({"query_ids": search["query_ids"][:-1]}, "query_ids have shape .39."),
        ({"gallery_cams": search["gallery_cams"] + 0.5}, "integers or strings"),
        ({"gallery_cams": np.array(["a", 1] * 75, dtype=object)}, r"are object \(row 1: 1\): give integers or strings"),
        *(
            (
                {"gallery_ids": kind(["a", math.nan] * 75)},
                r"gallery_ids are object \(row 1: nan\): give",
            )
            for kind in (list, deque, pd.Series, partial(np.array, dtype=object))
        ),
        ({"gallery_ids": [1, None] * 75}, r"object \(row 1: None\)"),
        *(
            ({f"{side}_ids": [name, "a"] * (size // 2) for side, size in (("query", 40), ("gallery", 150))}, message)
            for name, message in (("", "hold an empty name"), ("nan", "gallery_ids: nan stands for a missing value"))
        ),
        ({"junk": ["nobody"]}, "the identities are integers, so give integers"),
        ({"gallery_cams": None}, "query_cams without gallery_cams"),
        ({"gallery_cams": ["a"] * 150}, "same kind"),
        ({"metric": "manhattan"}, "'manhattan'.*'euclidean', 'cosine'"),
        ({"ties": "random"}, "'random'"),
        ({"protocol": "market"}, "'market'"),
        ({"max_rank": 0}, "max_rank=0"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate(**(search | change))
    monkeypatch.setattr(reranking, "rerank", lambda *args, **options: pytest.fail("re-ranking takes minutes"))
    late: list[dict[str, Any]] = [{"ties": "random"}, {"protocol": "market"}, {"max_rank": 0}, {"gallery_cams": None}]
    for change in (*late, {"gallery_cams": [0]}, {"seed": -1}):
        with pytest.raises(ValueError, match=r"random|market|max_rank=0|without gallery_cams|cams have shape|seed=-1"):
            evaluate(**(search | change), rerank=True)


def test_a_gallery_that_starts_with_the_queries() -> None:
    search = random_search()
    gallery, ids = search["gallery"], search["gallery_ids"]
    ranked = rank_queries(FeatureDistances(gallery[:20], gallery), ids[:20], ids, gallery_starts_with_query=True)
    for q in range(20):
        others = np.delete(np.arange(len(gallery)), q)
        alone = evaluate(gallery[q : q + 1], gallery[others], ids[q : q + 1], ids[others])
        assert float(ranked.average_precision[q]) == pytest.approx(alone.mAP)
    assert ranked.num_junk.tolist() == [1] * 20
    with pytest.raises(ValueError, match="identities are not those of the queries"):
        rank_queries(FeatureDistances(gallery[:20], gallery), ids[1:21], ids, gallery_starts_with_query=True)
    with pytest.raises(ValueError, match="identities are not those of the queries"):
        rank_queries(FeatureDistances(gallery, gallery[:20]), ids, ids[:20], gallery_starts_with_query=True)
    with pytest.raises(ValueError, match="the query itself"):
        rank_queries(FeatureDistances(gallery, gallery), range(150), range(150), gallery_starts_with_query=True)


def test_settings_of_matrix_products_do_not_matter_and_are_restored() -> None:
    search = random_search()
    expected = numbers(**search)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert numbers(**search) == expected
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_distances_are_torchreids(metric: Any) -> None:
    torchreid = pytest.importorskip("torchreid")
    search = random_search()
    expected = torchreid.metrics.compute_distance_matrix(search["query"], search["gallery"], metric)
    actual = FeatureDistances(search["query"], search["gallery"], metric).distances(3, 11)
    torch.testing.assert_close(actual, expected[3:11], atol=1e-5, rtol=1e-5)


class TestSingleGalleryShot:
    def test_average_precision_is_torchreids(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(np, "bool", np.bool_, raising=False)  # numpy 1.26 lacks it, and torchreid uses it here
        search = random_search()
        _, mean_ap = host_scores(search, "euclidean", max_rank=5, use_metric_cuhk03=True)
        assert evaluate(**search, protocol="single-gallery-shot").mAP == pytest.approx(mean_ap, abs=1e-6)

    def test_cmc_is_the_expectation_over_all_galleries(self) -> None:
        search = random_search(num_query=4, num_gallery=10, dim=2, seed=3)
        search["query_ids"], search["gallery_ids"] = np.array([0, 1, 2, 0]), np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
        search["query_cams"], search["gallery_cams"] = np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0, 1, 0, 0, 1, 2, 1])
        curves = []
        for q in range(4):
            distances = (search["query"][q] - search["gallery"]).square().sum(1).tolist()
            kept = [
                [g for g in range(10) if search["gallery_ids"][g] == i
                 and not (i == search["query_ids"][q] and search["gallery_cams"][g] == search["query_cams"][q])]
                for i in range(3)
            ]  # fmt: skip
            places = []
            for gallery in itertools.product(*kept):
                match = gallery[search["query_ids"][q]]
                places.append(1 + sum(distances[g] < distances[match] for g in gallery))
            curves.append([np.mean([place <= k for place in places]) for k in (1, 2, 3)])
        results = [evaluate(**search, protocol="single-gallery-shot", max_rank=3, seed=seed) for seed in range(300)]
        np.testing.assert_allclose(np.mean([r.cmc for r in results], axis=0), np.mean(curves, axis=0), atol=0.02)

    def test_seed_alone_decides(self) -> None:
        search = random_search()
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = numbers(**search, protocol="single-gallery-shot", seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        np.random.seed(1)
        assert first == numbers(**search, protocol="single-gallery-shot", seed=5)
        assert first != numbers(**search, protocol="single-gallery-shot", seed=6)


OPTIONS = [{}, {"protocol": "single-gallery-shot"}, {"rerank": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_default_device_does_not_matter(options: dict[str, Any]) -> None:
    search = random_search()
    search["gallery"] = search["gallery"].numpy()
    expected = numbers(**search, **options)
    with torch.device("meta"):
        assert numbers(**search, **options) == expected


@pytest.mark.parametrize("options", OPTIONS)
def test_the_default_type_does_not_matter(options: dict[str, Any]) -> None:
    search = random_search(num_gallery=3000)
    expected = numbers(**search, max_rank=3000, **options)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert numbers(**search, max_rank=3000, **options) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.cuda
@pytest.mark.parametrize("options", OPTIONS if torch.cuda.is_available() else [])
def test_cuda_equals_cpu(options: dict[str, Any]) -> None:
    search = random_search()
    search |= {key: search[key].mul(8).round() for key in ("query", "gallery")}
    # Re-ranking compares neighbour lists, which rounding can change.
    tolerance = 1e-3 if "rerank" in options else 1e-9
    on_cpu = numbers(**search, **options)
    assert numbers(**search, **options, device="cuda") == pytest.approx(on_cpu, abs=tolerance)
