"""k-reciprocal re-ranking against the host's ``re_ranking``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pml_drsl.evaluation import distances as distance_rows
from pml_drsl.evaluation.reranking import rerank
from pml_drsl.evaluation.scores import evaluate, rank_queries, summarize


def clusters(num_query: int, num_gallery: int, dim: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(12, dim, generator=generator)
    ids = torch.randint(0, 12, (num_query + num_gallery,), generator=generator)
    features = centers[ids] + 0.5 * torch.randn(len(ids), dim, generator=generator)
    return features[:num_query], features[num_query:], ids[:num_query], ids[num_query:]


def host_distances(query: Tensor, gallery: Tensor, metric: str, **kwargs: Any) -> np.ndarray:
    torchreid = pytest.importorskip("torchreid")
    measure = torchreid.metrics.compute_distance_matrix
    sides = ((query, gallery), (query, query), (gallery, gallery))
    return torchreid.utils.re_ranking(*(measure(a, b, metric).numpy() for a, b in sides), **kwargs)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("metric", "num_query", "num_gallery", "kwargs"),
    [
        ("cosine", 30, 100, {}),
        ("euclidean", 30, 100, {}),
        ("euclidean", 30, 300, {"k1": 15, "k2": 3, "lambda_value": 0.1}),
        ("euclidean", 5, 60, {"k1": 7, "k2": 1}),
        ("euclidean", 20, 80, {"k1": 5, "k2": 10, "lambda_value": 0.0}),  # more neighbours averaged than compared
        ("euclidean", 3, 6, {}),  # fewer images than neighbours
    ],
)
def test_equals_the_host(metric: Any, num_query: int, num_gallery: int, kwargs: dict[str, Any]) -> None:
    query, gallery, _, _ = clusters(num_query, num_gallery)
    expected = host_distances(query, gallery, metric, **kwargs)
    actual = rerank(query, gallery, metric=metric, **kwargs)
    rows = [actual.rows(start, min(start + 7, num_query)) for start in range(0, num_query, 7)]
    np.testing.assert_allclose(torch.cat(rows).numpy(), expected, atol=1e-5)


def test_evaluates_re_ranked_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    torchreid = pytest.importorskip("torchreid")
    query, gallery, query_ids, gallery_ids = clusters(40, 200)
    cams = {"query_cams": [0] * 40, "gallery_cams": [1, 2] * 100}
    distances = host_distances(query, gallery, "euclidean")
    cmc, mean_ap = torchreid.metrics.evaluate_rank(
        distances, query_ids.numpy(), gallery_ids.numpy(), *map(np.array, cams.values()), use_cython=False
    )
    result = evaluate(query, gallery, query_ids, gallery_ids, **cams, rerank=True)
    # Re-ranking makes many exact ties (no shared neighbour), which the host leaves to argsort.
    assert result.mAP == pytest.approx(mean_ap, abs=1e-3)
    np.testing.assert_allclose(result.cmc, cmc, atol=1e-2)
    assert result.mAP > evaluate(query, gallery, query_ids, gallery_ids, **cams).mAP
    monkeypatch.setattr(distance_rows, "ELEMENTS_PER_CHUNK", 9 * 200)
    by_hand = summarize(rank_queries(rerank(query, gallery), query_ids, gallery_ids, **cams))
    assert by_hand.mAP == pytest.approx(result.mAP, abs=1e-9)


def test_junk_takes_no_part_and_is_infinitely_far() -> None:
    query, gallery, _, _ = clusters(12, 60)
    is_junk = torch.arange(12) % 5 == 0, torch.arange(60) % 3 == 1
    # Copies of real images would be the nearest neighbours of all.
    query[is_junk[0]], gallery[is_junk[1]] = query[1:4].clone(), gallery[:40:2].clone()
    expected = torch.full((12, 60), torch.inf)
    real = ~is_junk[0][:, None] & ~is_junk[1]
    expected[real] = rerank(query[~is_junk[0]], gallery[~is_junk[1]]).rows(0, 9).flatten()
    ranked = rerank(query, gallery, is_junk=is_junk)
    assert (ranked.num_query, ranked.num_gallery) == (12, 60)
    rows = [ranked.rows(start, min(start + 5, 12)) for start in range(0, 12, 5)]
    torch.testing.assert_close(torch.cat([*rows, ranked.rows(5, 6)]), torch.cat([expected, expected[5:6]]))


def test_finite_for_identical_images_and_half_precision() -> None:
    rows = rerank(torch.ones(2, 4, dtype=torch.float16), torch.ones(5, 4)).rows(0, 2)
    assert rows.isfinite().all()
    query, gallery, _, _ = clusters(10, 50)
    half = rerank(query.half(), gallery.half().numpy()).rows(0, 10)
    torch.testing.assert_close(half, rerank(query.half().float(), gallery.half().float()).rows(0, 10))


def test_errors_name_the_value() -> None:
    query, gallery, _, _ = clusters(5, 20)
    for change, message in (({"k1": 0}, "k1=0"), ({"k2": 0}, "k2=0"), ({"lambda_value": 1.5}, r"lambda_value=1\.5")):
        with pytest.raises(ValueError, match=message):
            rerank(query, gallery, **change)
    with pytest.raises(ValueError, match="1 of 5 query features"):
        rerank(query.index_fill(0, torch.tensor([2]), torch.nan), gallery)
