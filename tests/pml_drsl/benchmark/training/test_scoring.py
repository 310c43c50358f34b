"""Retrieval scores of a test, and of each identity."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from pml_drsl.benchmark.training.images import Images
from pml_drsl.benchmark.training.scoring import score

PIXELS = torch.zeros(30, 1, 1, 1, dtype=torch.uint8)


@pytest.fixture
def embeddings():
    return torch.from_numpy(np.random.default_rng(0).normal(size=(30, 4))).float()


def labels_of(generator):
    return torch.from_numpy(generator.integers(0, 5, 30))


def test_without_cameras_scores_are_those_of_a_loop_over_the_queries(embeddings):
    labels = labels_of(np.random.default_rng(1))
    labels[0] = 5  # the only image of its identity: nothing to find
    found, of_identity = score(embeddings, Images(PIXELS, labels))
    similarity = (F.normalize(embeddings) @ F.normalize(embeddings).T).numpy()
    first, at_r = {}, {}
    for query in range(1, 30):
        others = np.array([other for other in range(30) if other != query])
        ordered = (labels[others[np.argsort(-similarity[query, others])]] == labels[query]).numpy()
        r = ordered.sum()
        first[query] = ordered[0]
        at_r[query] = sum(ordered[: k + 1].mean() for k in range(r) if ordered[k]) / r
    assert found["P@1"] == pytest.approx(np.mean(list(first.values())))
    assert found["MAP@R"] == pytest.approx(np.mean(list(at_r.values())))
    for label in range(5):
        mean = np.mean([at_r[query] for query in at_r if labels[query] == label])
        assert of_identity[label] == round(1e4 * mean)
    assert of_identity[5] is None


def test_with_cameras_scores_are_those_of_a_loop_over_the_queries(embeddings):
    rng = np.random.default_rng(2)
    labels, cameras = labels_of(rng), torch.from_numpy(rng.integers(0, 3, 30))
    queries = cameras == 0
    numbers = torch.tensor([1, 4, 5, 8, 9])
    found, of_identity = score(embeddings, Images(PIXELS, labels, cameras, queries, numbers=numbers))
    similarity = (F.normalize(embeddings) @ F.normalize(embeddings).T).numpy()
    precision = {}
    for query in queries.nonzero()[:, 0].tolist():
        others = (~queries).nonzero()[:, 0].numpy()
        matches = (labels[others] == labels[query]).numpy()
        if matches.any():
            precision[query] = average_precision_score(matches, similarity[query, others])
    assert found["mAP"] == pytest.approx(np.mean(list(precision.values())))
    for label, number in enumerate(numbers.tolist()):
        mine = [precision[query] for query in precision if labels[query] == label]
        assert of_identity[number] == (round(1e4 * np.mean(mine)) if mine else None)
    assert len(of_identity) == 10 and of_identity[0] is None


def test_without_queries_every_image_is_searched_for_among_other_cameras(embeddings):
    labels = torch.arange(30) // 6
    cameras = torch.arange(30) % 2
    perfect = F.one_hot(labels).float()
    found, of_identity = score(perfect, Images(PIXELS, labels, cameras))
    assert found["mAP"] == found["rank-1"] == 1 and of_identity == [10_000] * 5
    by_camera = F.one_hot(labels * 2 + cameras).float()  # finds only what does not count
    assert score(by_camera, Images(PIXELS, labels, cameras))[0]["mAP"] < 0.3
