"""One run of the benchmark: its images, its batches, its losses."""

import argparse

import pytest
import torch
from image_folders import draw
from pytorch_metric_learning.losses import ContrastiveLoss, SmoothAPLoss
from torch.nn import functional as F

from pml_drsl import DRSLoss
from pml_drsl.benchmark.training import experiment
from pml_drsl.benchmark.training.candidates import CANDIDATES, CROSS_ENTROPY, DRSL, SETTINGS, defaults
from pml_drsl.benchmark.training.criterion import Criterion
from pml_drsl.benchmark.training.protocol import WEIGHTS
from pml_drsl.benchmark.training.scoring import score
from pml_drsl.benchmark.training.trial import Trainer, Trial, run

SMALL = ["--size", "16", "16", "--batch", "4", "2", "--epochs", "2", "--device", "cpu", "--folds", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("images"), 16)


def load(*arguments):
    """The data set that the arguments of the command line describe."""
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    return experiment._one_set(parser.parse_args([*SMALL, *map(str, arguments)]))


@pytest.fixture(scope="module")
def mine(folder):
    return load("--train", folder)


def trial_of(mine, loss=DRSL, **changes):
    return Trial(mine.name, loss=loss, **{"split": "fold 0", "parameters": defaults(loss), **changes})


def test_half_of_the_identities_are_the_test(mine):
    train, test = mine.data.split("test")
    assert (train.identities, test.identities) == (8, 8)
    assert train.pixels.shape == (48, 1, 16, 16) and mine.score == "MAP@R"


def test_validation_shares_no_image_with_training_or_test(mine):
    everything = mine.data.split("test")[0]
    train, validation = mine.data.split("fold 0")
    assert (train.identities, validation.identities) == (6, 2)
    together = torch.cat([train.pixels, validation.pixels])
    assert sorted(together.flatten(1).tolist()) == sorted(everything.pixels.flatten(1).tolist())


def test_digits_are_there_without_any_file():
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    train, test = experiment._one_set(parser.parse_args([])).data.split("test")
    assert train.identities == 6 and test.identities == 4
    assert train.labels.unique().tolist() == list(range(6))


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


def test_a_link_to_a_folder_that_is_trained_on_is_not_tested_on(folder, tmp_path):
    (tmp_path / "test").mkdir()
    for number in range(12, 16):
        (tmp_path / "test" / f"other{number}").symlink_to(folder / f"identity{number}")
    with pytest.raises(ValueError, match="never trained on"):
        load("--train", folder, "--test", tmp_path / "test")


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
    mine = load("-s", "bars_for_the_benchmark", "--folds", "2")
    train, test = mine.data.split("test")
    assert train.pixels.shape[1] == 3 and mine.score == "mAP"
    assert test.queries.sum() == 12 and len(test) == 24
    found, _ = score(F.one_hot(test.labels).float(), test)
    assert found["mAP"] == found["rank-1"] == 1


def test_a_trial_repeats_itself(mine):
    trial = trial_of(mine, split="test")
    first = run(trial, mine, "cpu")
    assert first == run(trial, mine, "cpu")
    assert sum(score is not None for score in first["identities"]) == 8
    assert "identities" not in run(trial.but(split="fold 0"), mine, "cpu")


def test_each_seed_trains_another_network(mine):
    train, test = mine.data.split("fold 0")
    embeddings = []
    for seed in (0, 0, 1):
        trainer = Trainer(trial_of(mine).but(seed=seed), mine, train, "cpu")
        trainer.epoch(0)
        embeddings.append(trainer.embed(test))
    assert torch.equal(embeddings[0], embeddings[1]) and not torch.equal(embeddings[0], embeddings[2])


def test_every_loss_sees_the_same_images_and_starts_from_the_same_network(mine):
    train, _ = mine.data.split("fold 0")
    one, other = (Trainer(trial_of(mine, loss), mine, train, "cpu") for loss in ("DRSL", "ArcFace"))
    assert [[batch.tolist() for batch in epoch] for epoch in one.batches] == [
        [batch.tolist() for batch in epoch] for epoch in other.batches
    ]
    for ours, theirs in zip(one.network.state_dict().values(), other.network.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("loss", CANDIDATES)
def test_every_setting_of_every_loss_trains(loss, mine):
    candidate = CANDIDATES[loss]
    # Cross-entropy has no other cross-entropy beside it: it has more settings instead.
    assert len(candidate.grid) == SETTINGS + (len(WEIGHTS) - 1) * (loss == CROSS_ENTROPY)
    assert all(candidate.grid.count(point) == 1 for point in candidate.grid)
    train, _ = mine.data.split("fold 0")
    for number, point in enumerate(candidate.grid):
        besides = {"cross_entropy": 0.1, "memory": 64 if candidate.in_memory else 0} if number == 0 else {}
        trainer = Trainer(trial_of(mine, loss, parameters=point, **besides), mine, train, "cpu")
        before = [weight.clone() for weight in trainer.network.parameters()]
        trainer.epoch(0)
        assert any(not torch.equal(*pair) for pair in zip(before, trainer.network.parameters(), strict=True))


def test_drsl_out_of_the_box_is_the_loss_as_shipped():
    x, labels = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8).repeat_interleave(4)
    criterion = Criterion(DRSL, defaults(DRSL), 8, 8)
    torch.testing.assert_close(criterion(x, labels), DRSLoss()(x, labels))
    assert repr(criterion.loss) == repr(DRSLoss())


def test_the_triplet_loss_is_torchreids():
    torchreid = pytest.importorskip("torchreid")
    x, labels = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8).repeat_interleave(4)
    criterion = Criterion("Triplet (torchreid)", {}, 8, 8)
    torch.testing.assert_close(criterion(x, labels), torchreid.losses.TripletLoss()(x, labels))


def test_weights_of_a_loss_have_a_learning_rate_of_their_own():
    groups = Criterion("ArcFace", {}, 8, 4, cross_entropy=1.0).groups(0.001, 0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.0), (0.001, 0.1)]
    assert [group["lr"] for group in Criterion("ArcFace", {"lr": 0.5}, 8, 4).groups(0.001, 0.1)] == [0.5]
    assert [group["lr"] for group in Criterion(CROSS_ENTROPY, {}, 8, 4).groups(0.001, 0.1)] == [0.001]


def test_smooth_ap_is_pmls_where_that_is_right():
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4).repeat_interleave(4)  # as many classes as images of each
    criterion = Criterion("SmoothAP", {"temperature": 0.05}, 4, 8)
    torch.testing.assert_close(criterion(x, labels), SmoothAPLoss(0.05)(x, labels))


def test_positives_are_as_few_as_the_trial_says():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16).repeat_interleave(4)
    criterion = Criterion("Contrastive", {}, 16, 8, negatives_per_positive=7.0)
    a1, p, a2, n = criterion.miner(x, labels)
    assert a1.bincount().tolist() == [1] * 64 and a2.bincount().tolist() == [7] * 64
    assert (labels[a1] == labels[p]).all() and (a1 != p).all() and (labels[a2] != labels[n]).all()
    again = Criterion("Contrastive", {}, 16, 8, negatives_per_positive=7.0)
    torch.testing.assert_close(again(x, labels), ContrastiveLoss()(x, labels, (a1, p, a2, n)))


def test_of_few_images_an_epoch_is_one_batch(mine):
    train, _ = mine.data.split("fold 0")
    trainer = Trainer(trial_of(mine, changes={"identities": 100, "instances": 40}), mine, train, "cpu")
    assert [len(epoch) for epoch in trainer.batches] == [1, 1]
    assert train.labels[trainer.batches[0][0]].bincount().tolist() == [40] * 6
