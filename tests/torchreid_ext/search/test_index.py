"""The index finds what a slow search in float64 finds, and says how much it finds where it is approximate."""

import faiss
import numpy as np
import pytest
import torch

from pml_drsl.checks import InputError
from torchreid_ext.search.index import TARGET_RECALL, FeatureIndex


def draw(number, dim=8, seed=0):
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))


def slowly(queries, features, metric):
    """All distances, by a definition in float64."""
    left, right = queries.double()[:, None], features.double()[None]
    if metric == "cosine":
        return 1 - torch.cosine_similarity(left, right, dim=2)
    return (left - right).square().sum(dim=2)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("exact_below", [1000, 100], ids=["exact", "lists"])
def test_the_nearest_are_those_of_a_slow_search(metric, exact_below):
    features, queries = draw(300), draw(7, seed=1)
    index = FeatureIndex(8, metric, exact_below)
    index.add(features[:50], np.arange(50))
    index.add(features[50:], np.arange(50, 300))
    assert index.exact == (exact_below == 1000) and len(index) == 300
    if not index.exact:
        index._index.nprobe = index._index.nlist
    numbers, distances = index.search(queries, 5)
    expected, order = slowly(queries, features, metric).sort(dim=1)
    assert np.array_equal(numbers, order[:, :5].numpy())
    assert np.abs(distances - expected[:, :5].numpy()).max() < 1e-5
    assert index.search(queries, 1000)[0].shape == (7, 300)


@pytest.mark.parametrize("exact_below", [1000, 100], ids=["exact", "lists"])
def test_adding_and_removing(exact_below):
    features = draw(300)
    index = FeatureIndex(8, "euclidean", exact_below)
    index.add(features, np.arange(300))
    index.remove(np.array([7, 9]))
    assert len(index) == 298 and 7 not in index.search(features[[7]], 298)[0]
    index.add(features[[7]], np.array([1007]))
    assert index.search(features[[7]], 1)[0].tolist() == [[1007]]
    assert torch.equal(index.features(np.array([1007, 8])), features[[7, 8]])
    again = FeatureIndex.from_bytes(index.to_bytes(), 8, "euclidean", exact_below)
    again.remove(np.array([1007]))
    again.add(draw(3, seed=2), np.array([2000, 2001, 2002]))
    assert len(again) == 301 and again.exact == index.exact
    again.remove(np.array([number for number in [*range(300), 2000, 2001, 2002] if number not in (7, 9)]))
    assert len(again) == 0


def test_the_recall_is_what_is_measured_by_hand():
    features = draw(5000, 16)
    index = FeatureIndex(16, "euclidean", 1000)
    index.add(features, np.arange(5000))
    assert index.recall.recall >= TARGET_RECALL and index.recall.read < index.recall.lists
    # The same share, of all features and not of a sample.
    exact = faiss.IndexFlatL2(16)
    exact.add(features.numpy())
    truth = exact.search(features.numpy(), 11)[1][:, 1:]
    found = index.search(features, 11)[0]
    share = np.mean([len(np.intersect1d(mine, theirs)) / 10 for mine, theirs in zip(found, truth, strict=True)])
    assert abs(share - index.recall.recall) < 0.03
    assert f"{index.recall.recall:.1%} of the nearest 10" in str(index.recall)
    # All lists are too many to read for one thing that is found in the first.
    assert index.recall.lists == 5000 // 64


def test_features_that_are_not_finite_are_refused():
    index = FeatureIndex(8, "euclidean")
    with pytest.raises(InputError, match="NaN"):
        index.add(torch.full((1, 8), float("nan")), np.arange(1))


def test_bytes_that_are_no_index_are_refused():
    index = FeatureIndex(8, "euclidean")
    index.add(draw(10), np.arange(10))
    data = index.to_bytes()
    with pytest.raises(InputError, match="cannot read"):
        FeatureIndex.from_bytes(data[: len(data) // 2], 8, "euclidean")
    with pytest.raises(InputError, match="8 dimensions"):
        FeatureIndex.from_bytes(data, 9, "euclidean")
