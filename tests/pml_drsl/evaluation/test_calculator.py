"""``ReIDAccuracyCalculator`` alone and inside pytorch-metric-learning's tester."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester, WithSameParentLabelTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch.utils.data import TensorDataset

from pml_drsl.checks import InputError
from pml_drsl.evaluation.calculator import ReIDAccuracyCalculator
from pml_drsl.evaluation.scores import evaluate

CPU = torch.device("cpu")
METRICS = {"mAP", "mINP", "rank_1", "rank_5", "rank_10", "rank_20"}


@pytest.fixture
def search() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "query": torch.randn(20, 8, generator=generator),
        "gallery": torch.randn(60, 8, generator=generator),
        "query_ids": torch.randint(0, 5, (20,), generator=generator),
        "gallery_ids": torch.randint(0, 5, (60,), generator=generator),
        "query_cams": torch.randint(0, 3, (20,), generator=generator),
        "gallery_cams": torch.randint(0, 3, (60,), generator=generator),
    }


def data(search: dict[str, Any]) -> list[Any]:
    return [search[key] for key in ("query", "query_ids", "gallery", "gallery_ids")]


def with_cameras(search: dict[str, Any], **kwargs: Any) -> ReIDAccuracyCalculator:
    cameras = {"query_cams": search["query_cams"], "reference_cams": search["gallery_cams"]}
    return ReIDAccuracyCalculator(**cameras, device="cpu", **kwargs)


def in_tester(calculator: ReIDAccuracyCalculator, kind: Any = GlobalEmbeddingSpaceTester) -> Any:
    options = {"normalize_embeddings": False, "data_device": CPU, "dataloader_num_workers": 0}
    return kind(**options, accuracy_calculator=calculator)


@pytest.mark.parametrize(
    "options",
    [{}, {"metric": "cosine", "ties": "pessimistic"}, {"protocol": "single-gallery-shot", "seed": 3}],
)
def test_equals_evaluate(search: dict[str, Any], options: dict[str, Any]) -> None:
    search |= {key: search[key].round() for key in ("query", "gallery")}  # Whole numbers, which tie.
    metrics = with_cameras(search, include=(*METRICS, "cmc"), max_rank=10, **options).get_accuracy(*data(search))
    expected = evaluate(**search, max_rank=20, **options)
    for name in options:  # Each has an effect here.
        without = {other: value for other, value in options.items() if other != name}
        assert evaluate(**search, max_rank=20, **without) != expected, name
    assert metrics.keys() == METRICS | {"cmc"}
    assert (metrics["mAP"], metrics["mINP"]) == pytest.approx((expected.mAP, expected.mINP))
    assert [metrics[f"rank_{k}"] for k in (1, 5, 10, 20)] == pytest.approx([expected.rank(k) for k in (1, 5, 10, 20)])
    np.testing.assert_allclose(metrics["cmc"], expected.cmc[:10])


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_metrics_by_name(search: dict[str, Any], metric: Any) -> None:
    names = ("rank_1", "precision_at_1", "mAP", "mean_average_precision")
    calculator = ReIDAccuracyCalculator(include=names, device=CPU, metric=metric)
    metrics = calculator.get_accuracy(*data(search))
    assert metrics["rank_1"] == metrics["precision_at_1"]  # without cameras they are the same number
    assert metrics["mAP"] == pytest.approx(metrics["mean_average_precision"])
    with pytest.raises(InputError, match=r"include names 'cmc', and this calculator has .*: name it in the constr"):
        calculator.get_accuracy(*data(search), include=("mAP", "cmc"))
    calculator = ReIDAccuracyCalculator(exclude=("mINP",), device=CPU)
    assert calculator.get_accuracy(*data(search)).keys() == METRICS - {"mINP"}
    assert calculator.get_accuracy(*data(search), include=("mAP",)).keys() == {"mAP"}
    with pytest.raises(ValueError, match="rank_1"):
        ReIDAccuracyCalculator(include=("rank_3",))


def test_agrees_with_pml_where_there_are_no_cameras(search: dict[str, Any]) -> None:
    x, labels = search["gallery"], search["gallery_ids"]
    theirs = AccuracyCalculator(include=("mean_average_precision",), device=CPU).get_accuracy(x, labels)
    assert ReIDAccuracyCalculator(device=CPU).get_accuracy(x, labels)["mAP"] == pytest.approx(
        theirs["mean_average_precision"], abs=1e-6
    )  # and the query is left out of its own gallery


def test_averages_by_identity(search: dict[str, Any]) -> None:
    include = ("mAP", "cmc")
    by_class = with_cameras(search, include=include, return_per_class=True).get_accuracy(*data(search))
    of_averages = with_cameras(search, include=include, avg_of_avgs=True).get_accuracy(*data(search))
    for identity in range(5):
        mine = search["query_ids"] == identity
        part = search | {key: search[key][mine] for key in ("query", "query_ids", "query_cams")}
        assert by_class["mAP"][identity] == pytest.approx(evaluate(**part).mAP)
        assert by_class["cmc"][identity] == pytest.approx(list(evaluate(**part).cmc))
    assert of_averages["mAP"] == pytest.approx(np.mean(by_class["mAP"]))
    np.testing.assert_allclose(of_averages["cmc"], np.mean(by_class["cmc"], axis=0))


def test_large_identities_are_told_apart(search: dict[str, Any]) -> None:
    """PML compares labels as float32, in which 2^24 and 2^24 + 1 are the same."""
    large = search | {key: search[key] + 2**24 for key in ("query_ids", "gallery_ids")}
    assert with_cameras(search).get_accuracy(*data(large))["mAP"] == pytest.approx(evaluate(**search).mAP)


def test_junk_identities_change_no_metric(search: dict[str, Any]) -> None:
    options = {"include": (*METRICS, "precision_at_1", "mean_average_precision", "r_precision")}
    expected = with_cameras(search, **options).get_accuracy(*data(search))
    junk = {"query": torch.zeros(3, 8), "query_ids": [-1] * 3, "query_cams": [0] * 3}
    junk |= {"gallery": search["query"], "gallery_ids": [-1] * 20, "gallery_cams": [9] * 20}
    more = {key: torch.cat([torch.as_tensor(junk[key]), search[key]]) for key in search}
    metrics = with_cameras(more, **options).get_accuracy(*data(more))
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value), name
    others = {key: value.masked_fill(value == -1, 77) if key.endswith("ids") else value for key, value in more.items()}
    assert with_cameras(others, junk=[77]).get_accuracy(*data(others))["mAP"] == pytest.approx(expected["mAP"])
    assert with_cameras(others).get_accuracy(*data(others))["mAP"] < expected["mAP"]
    # Each query is removed from its own gallery.
    calculator = ReIDAccuracyCalculator(**options, device=CPU)
    expected = calculator.get_accuracy(search["gallery"], search["gallery_ids"])
    for name, value in calculator.get_accuracy(more["gallery"], more["gallery_ids"]).items():
        assert value == pytest.approx(expected[name]), name
    with pytest.raises(ValueError, match="all query images have a junk identity"):
        calculator.get_accuracy(search["query"], [-1] * 20, search["gallery"], search["gallery_ids"])


def test_the_default_device_does_not_matter(search: dict[str, Any]) -> None:
    expected = with_cameras(search).get_accuracy(*data(search))["mAP"]
    with torch.device("meta"):
        assert with_cameras(search).get_accuracy(*data(search))["mAP"] == expected
        assert ReIDAccuracyCalculator(device=CPU).get_accuracy(search["gallery"], search["gallery_ids"])["mAP"] > 0


def test_errors(search: dict[str, Any]) -> None:
    calculator = ReIDAccuracyCalculator(query_cams=[0] * 3, reference_cams=search["gallery_cams"], device=CPU)
    with pytest.raises(ValueError, match=r"query_cams have shape \[3\].*20"):
        calculator.get_accuracy(*data(search))
    calculator.set_cameras(search["query_cams"], search["gallery_cams"])
    ahead = calculator.get_accuracy(*data(search))["mAP"]
    assert ahead > 0
    backwards = [np.asarray(each)[::-1] for each in data(search)]
    calculator.set_cameras(search["query_cams"].flip(0), search["gallery_cams"].flip(0))
    assert calculator.get_accuracy(*backwards)["mAP"] == pytest.approx(ahead)
    pairs = torch.stack([search["query_ids"], search["query_cams"]], dim=1)
    with pytest.raises(ValueError, match="set_cameras"):
        calculator.get_accuracy(search["query"], pairs, search["gallery"], search["gallery_ids"])
    with pytest.raises(ValueError, match=r"not integers: 0\.5"):
        calculator.get_accuracy(search["query"], search["query_ids"] + 0.5, search["gallery"], search["gallery_ids"])
    for text in (list("abc"), np.array(list("abc"))):
        with pytest.raises(InputError, match=r"query labels are no integers .*number the identities"):
            calculator.get_accuracy(search["query"], text, search["gallery"], search["gallery_ids"])
    with pytest.raises(ValueError, match="reference without reference_labels: give the identities"):
        calculator.get_accuracy(search["query"], search["query_ids"], search["gallery"])
    with pytest.raises(ValueError, match="label_comparison_fn"):
        ReIDAccuracyCalculator(label_comparison_fn=torch.eq)
    wrong: tuple[dict[str, Any], ...] = ({"metric": "cos"}, {"ties": "no"}, {"protocol": "cuhk"}, {"max_rank": 0})
    for options in (*wrong, {"query_cams": [1]}):  # Before a tester extracts all features in vain.
        with pytest.raises(ValueError, match=r"'cos'|'no'|'cuhk'|max_rank=0|query_cams and reference_cams"):
            ReIDAccuracyCalculator(**options)
    with pytest.raises(ValueError, match="query_cams and reference_cams"):
        calculator.set_cameras(None, search["gallery_cams"])
    search["query"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 20 query features"):
        calculator.get_accuracy(*data(search))
    with pytest.raises(ValueError, match="1 of 20 query features"):
        ReIDAccuracyCalculator(device=CPU).get_accuracy(search["query"], search["query_ids"])


def test_in_a_tester(search: dict[str, Any]) -> None:
    sets = {
        "query": TensorDataset(search["query"], search["query_ids"]),
        "gallery": TensorDataset(search["gallery"], search["gallery_ids"]),
    }
    tester = in_tester(with_cameras(search, include=("mAP", "rank_1", "cmc")))
    scores = tester.test(sets, 1, torch.nn.Identity(), splits_to_eval=[("query", ["gallery"])])["query"]
    expected = evaluate(**search)
    assert scores["mAP_level0"] == pytest.approx(expected.mAP)
    assert scores["rank_1_level0"] == pytest.approx(expected.rank(1))
    np.testing.assert_allclose(scores["cmc_level0"], expected.cmc)


def test_in_a_tester_whose_gallery_includes_the_query(search: dict[str, Any]) -> None:
    sets = {"all": TensorDataset(search["gallery"], search["gallery_ids"])}
    scores = in_tester(ReIDAccuracyCalculator(device=CPU)).test(sets, 1, torch.nn.Identity())["all"]
    assert 0 < scores["mAP_level0"] < 0.9  # each query would find itself first otherwise
    assert 0 < scores["rank_1_level0"] < 0.9


def test_cameras_of_a_reference_set_that_a_tester_put_in_another_order(search: dict[str, Any]) -> None:
    sets = {name: TensorDataset(search[name], search[f"{name}_ids"]) for name in ("query", "gallery")}
    both = {key: torch.cat([search[f"query{key}"], search[f"gallery{key}"]]) for key in ("", "_ids", "_cams")}
    expected = evaluate(**search | {f"gallery{key}": value for key, value in both.items()})
    gallery_first = torch.cat([search["gallery_cams"], search["query_cams"]])
    for cams in (both["_cams"], gallery_first):
        calculator = ReIDAccuracyCalculator(query_cams=search["query_cams"], reference_cams=cams, device=CPU)
        tester = in_tester(calculator)
        arguments: Any = (sets, 1, torch.nn.Identity(), None, [("query", ["gallery", "query"])])
        if cams is gallery_first:
            with pytest.raises(ValueError, match=r"first gallery cameras .* put the query split first"):
                tester.test(*arguments)
        else:
            assert tester.test(*arguments)["query"]["mAP_level0"] == pytest.approx(expected.mAP)


def test_parents_of_different_sizes_and_one_without_a_match(search: dict[str, Any]) -> None:
    x, ids = search["gallery"], search["gallery_ids"]
    parents = (torch.arange(60) >= 24).long()
    tester = in_tester(ReIDAccuracyCalculator(device=CPU), WithSameParentLabelTester)
    sets = {"all": TensorDataset(x, torch.stack([ids, parents], 1))}
    scores = tester.test(sets, 1, torch.nn.Identity())["all"]
    of_parents = [
        ReIDAccuracyCalculator(device=CPU).get_accuracy(x[part], ids[part]) for part in (parents < 1, parents > 0)
    ]
    for name in METRICS:
        assert scores[f"{name}_level0"] == pytest.approx(np.mean([part[name] for part in of_parents]))
    lone = {"all": TensorDataset(x, torch.stack([torch.where(parents == 0, torch.arange(60) + 5, ids), parents], 1))}
    with pytest.warns(UserWarning, match="none of the 24 queries has a match"):
        assert np.isnan(tester.test(lone, 1, torch.nn.Identity())["all"]["mAP_level0"])


@pytest.mark.parametrize("option", ["avg_of_avgs", "return_per_class", None])
def test_metrics_are_nan_where_no_query_has_a_match_as_in_pml(option: str | None) -> None:
    include = (*METRICS, "cmc", "precision_at_1")
    calculator = ReIDAccuracyCalculator(include=include, device=CPU, **({option: True} if option else {}))
    with pytest.warns(UserWarning, match="no query identity occurs in the gallery"):
        metrics = calculator.get_accuracy(torch.eye(3), [5, 6, 6], torch.eye(3), [1, 2, 3])
    assert np.shape(metrics["mAP"]) == np.shape(metrics["precision_at_1"])
    assert all(np.isnan(value).all() for value in metrics.values())
