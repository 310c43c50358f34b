"""One run of the quality benchmark: its images, its batches, its scores."""

import argparse

import numpy as np
import pytest
import torch
from image_folders import draw
from pytorch_metric_learning.losses import ContrastiveLoss, SmoothAPLoss
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from pml_drsl.benchmark.training import images
from pml_drsl.benchmark.training.candidates import CANDIDATES, TRIALS, Criterion
from pml_drsl.benchmark.training.images import Images
from pml_drsl.benchmark.training.trial import Trainer, Trial, run, scores
from pml_drsl.benchmark.training.tuning import MEMORY_SIZE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("images"), 16)


def load(*arguments):
    parser = argparse.ArgumentParser()
    images.add_arguments(parser)
    return images.load(parser.parse_args([*map(str, arguments), "--size", "16", "16"]))


@pytest.fixture(scope="module")
def data(folder):
    return load("--train", folder)


def trial_of(data, **changes):
    return Trial(data.name, "validation", "DRSL", identities=4, instances=2, epochs=2, **changes)


def test_half_of_the_identities_are_the_test(data):
    assert (data.train.identities, data.test.identities) == (8, 8)
    assert data.train.pixels.shape == (48, 1, 16, 16)


def test_validation_shares_no_image_with_training_or_test(data):
    train, validation = data.split("validation")
    assert (train.identities, validation.identities) == (6, 2)
    together = torch.cat([train.pixels, validation.pixels])
    assert torch.equal(together, data.train.pixels)


def test_digits_are_there_without_any_file():
    digits = load()
    assert digits.train.identities == 6 and digits.test.identities == 4
    assert digits.train.labels.unique().tolist() == list(range(6))


def test_images_that_cannot_be_had_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (("--train", tmp_path / "empty"), "no images"),
        (("--train", tmp_path / "missing"), "not a folder"),
        (("--train", folder, "--test", folder), "never trained on"),
        (("--test", folder), "needs --train"),
        (("--train", folder, "-s", "market1501"), "not both"),
        (("--train", draw(tmp_path / "few", 3)), "too few"),
    ):
        with pytest.raises(ValueError, match=words):
            load(*arguments)
    broken = draw(tmp_path / "broken", 8)
    (broken / "identity03" / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2\.png is not an image"):
        load("--train", broken)


def test_a_torchreid_data_set_keeps_its_cameras_and_queries(tmp_path):
    torchreid = pytest.importorskip("torchreid")
    paths = sorted(draw(tmp_path / "images", 8).rglob("*.png"))
    samples = [(str(path), int(path.parent.name[-2:]), int(path.stem) % 2) for path in paths]

    class Bars(torchreid.data.ImageDataset):
        def __init__(self, root="", **kwargs):
            train = [sample for sample in samples if sample[1] < 4]
            rest = [(path, label - 4, camera) for path, label, camera in samples if label >= 4]
            query = [sample for sample in rest if sample[2] == 0]
            gallery = [sample for sample in rest if sample[2] == 1]
            super().__init__(train, query, gallery, **kwargs)

    torchreid.data.register_image_dataset("bars_for_the_benchmark", Bars)
    data = load("-s", "bars_for_the_benchmark")
    assert data.train.pixels.shape[1] == 3
    assert data.test.queries.sum() == 12 and len(data.test) == 24
    found = scores(F.one_hot(data.test.labels).float(), data.test)
    assert found["mAP"] == found["rank-1"] == found["MAP@R"] == 1


def test_a_trial_repeats_itself(data):
    trial = trial_of(data)
    first = run(trial, data, "cpu")
    assert first == run(trial, data, "cpu")
    assert first != run(trial.but(seed=1), data, "cpu")


def test_every_loss_sees_the_same_images_and_starts_from_the_same_network(data):
    train, _ = data.split("validation")
    one, other = (
        Trainer(trial_of(data).but(loss=loss, parameters=CANDIDATES[loss].grid[0]), train, "cpu")
        for loss in ("DRSL", "ArcFace")
    )
    assert [[batch.tolist() for batch in epoch] for epoch in one.batches] == [
        [batch.tolist() for batch in epoch] for epoch in other.batches
    ]
    for mine, theirs in zip(one.network.state_dict().values(), other.network.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("loss", CANDIDATES)
def test_every_setting_of_every_loss_trains(loss, data):
    candidate = CANDIDATES[loss]
    assert len(candidate.grid) == TRIALS
    train, _ = data.split("validation")
    for number, point in enumerate(candidate.grid):
        besides = {"cross_entropy": 0.1, "memory": MEMORY_SIZE if candidate.in_memory else 0} if number == 0 else {}
        trainer = Trainer(trial_of(data).but(loss=loss, parameters=point, **besides), train, "cpu")
        before = [weight.clone() for weight in trainer.network.parameters()]
        trainer.epoch(0)
        assert any(not torch.equal(*pair) for pair in zip(before, trainer.network.parameters(), strict=True))


def test_smooth_ap_is_pmls_where_that_is_right():
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4).repeat_interleave(4)  # as many classes as images of each
    trial = Trial("", "validation", "SmoothAP", {"temperature": 0.05})
    torch.testing.assert_close(Criterion(trial, 4, 8)(x, labels), SmoothAPLoss(0.05)(x, labels))


def test_rare_positives_are_as_rare_as_asked_for():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16).repeat_interleave(4)
    criterion = Criterion(Trial("", "validation", "Contrastive", negatives_per_positive=7.0), 16, 8)
    a1, p, a2, n = criterion.miner(x, labels)
    assert a1.bincount().tolist() == [1] * 64 and a2.bincount().tolist() == [7] * 64
    assert (labels[a1] == labels[p]).all() and (a1 != p).all() and (labels[a2] != labels[n]).all()
    again = Criterion(Trial("", "validation", "Contrastive", negatives_per_positive=7.0), 16, 8)
    torch.testing.assert_close(again(x, labels), ContrastiveLoss()(x, labels, (a1, p, a2, n)))


def test_scores_are_those_of_a_loop_over_the_queries():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(30, 4))).float()
    labels = torch.from_numpy(rng.integers(0, 5, 30))
    found = scores(x, Images(torch.zeros(30, 1, 1, 1, dtype=torch.uint8), labels))
    similarity = (F.normalize(x) @ F.normalize(x).T).numpy()
    precision, first, at_r = [], [], []
    for query in range(30):
        others = [other for other in range(30) if other != query]
        matches = np.array([labels[other] == labels[query] for other in others])
        of_query = similarity[query, others]
        precision.append(average_precision_score(matches, of_query))
        ordered = matches[np.argsort(-of_query)]
        first.append(ordered[0])
        r = ordered.sum()
        at_r.append(sum(ordered[: k + 1].mean() for k in range(r) if ordered[k]) / r)
    assert found["mAP"] == pytest.approx(np.mean(precision))
    assert found["rank-1"] == found["P@1"] == pytest.approx(np.mean(first))
    assert found["MAP@R"] == pytest.approx(np.mean(at_r))


def test_of_few_images_an_epoch_is_one_batch(data):
    train, _ = data.split("validation")
    trainer = Trainer(trial_of(data).but(identities=100, instances=40), train, "cpu")
    assert [len(epoch) for epoch in trainer.batches] == [1, 1]
    assert train.labels[trainer.batches[0][0]].bincount().tolist() == [40] * 6
