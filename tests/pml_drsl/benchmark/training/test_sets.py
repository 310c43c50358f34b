"""Data sets that a YAML file describes: what is trained on, tested on and held out."""

import random
from pathlib import Path

import pytest
import torch
import yaml
from image_folders import draw

from pml_drsl.benchmark.training import sets
from pml_drsl.benchmark.training.networks import Recipe, make_network
from pml_drsl.benchmark.training.trial import Trainer, Trial
from pml_drsl.checks import InputError

OURS = Path(__file__).parents[4] / "docs" / "benchmark-sets.yaml"


def write(folder, **described):
    file = folder / "sets.yaml"
    file.write_text(yaml.safe_dump(described))
    return file


def one(folder, images, training=None, weights=None):
    file = write(folder, mine={"images": {"size": [16, 16], **images}, "training": training or {}})
    (found,) = sets.from_yaml(file, folder, weights)
    return found


@pytest.fixture
def alphabets(tmp_path):
    """Three groups of four identities."""
    for group in "abc":
        draw(tmp_path / "train" / group, 4)
    draw(tmp_path / "test" / "d", 4)
    return tmp_path


def test_a_fold_holds_out_whole_groups(alphabets):
    data = one(alphabets, {"train": ["train"], "test": ["test"], "folds": 3}).data
    held_out = []
    for split in data.splits:
        train, test = data.split(split)
        assert len(test.groups.unique()) == 1 and set(test.groups.tolist()).isdisjoint(train.groups.tolist())
        assert (train.identities, test.identities, len(train)) == (8, 4, 48)
        held_out.append(int(test.groups[0]))
        together = torch.cat([train.numbers, test.numbers])
        assert sorted(together.tolist()) == list(range(12))
    assert sorted(held_out) == [0, 1, 2]


def test_without_groups_a_fold_holds_out_identities_at_random(tmp_path):
    draw(tmp_path / "train", 10)
    draw(tmp_path / "test", 4)
    data = one(tmp_path, {"train": ["train"], "test": ["test"], "folds": 2}).data
    folds = [sorted(data.split(split)[1].numbers.tolist()) for split in data.splits]
    assert [len(fold) for fold in folds] == [5, 5] and sorted(folds[0] + folds[1]) == list(range(10))
    assert folds[0] != list(range(5))


def test_each_seed_draws_the_identities_to_test_on(tmp_path):
    draw(tmp_path / "images", 12)
    data = one(tmp_path, {"folder": "images", "draw": 5}).data
    for seed in range(3):
        expected = list(range(12))
        random.Random(seed).shuffle(expected)
        train, test = data.split("test", seed)
        assert train.numbers.tolist() == sorted(expected[:5]) and test.numbers.tolist() == sorted(expected[5:])
    validation = torch.cat([part.numbers for part in data.split("fold 0", seed=2)])
    assert sorted(validation.tolist()) == data.split("test", 0)[0].numbers.tolist()


def test_cameras_that_ask_are_queries(tmp_path):
    draw(tmp_path / "images", 8)
    pattern = r"(?P<identity>[^/]+)/(?P<camera>\d)\.png"
    mine = one(tmp_path, {"folder": "images", "pattern": pattern, "query_cameras": [0, 3]})
    _, test = mine.data.split("test", 0)
    assert mine.score == "mAP" and torch.equal(test.queries, (test.cameras == 0) | (test.cameras == 3))
    with pytest.raises(InputError, match="none of them"):
        one(tmp_path, {"folder": "images", "pattern": pattern, "query_cameras": ["x"]})


def test_a_recipe_decides_what_is_trained(tmp_path):
    draw(tmp_path / "images", 8)
    training = {
        "identities": 2,
        "instances": 2,
        "views": 3,
        "epochs": 2,
        "warmup": 1,
        "lr": 0.1,
        "augmentation": "none",
    }
    mine = one(tmp_path, {"folder": "images"}, training)
    train, _ = mine.data.split("test", 0)
    trainer = Trainer(Trial("mine", "test", "cross-entropy"), mine, train, "cpu")
    seen = []
    trainer.criterion.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    rates = []
    for epoch in range(2):
        for indices in trainer.batches[epoch]:
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            trainer.step(indices)
    assert seen[0].bincount(minlength=4).sort().values.tolist() == [0, 0, 6, 6]
    steps = len(trainer.batches[0])
    assert rates[0] == pytest.approx(0.1 / steps) and max(rates) == rates[steps] == pytest.approx(0.1)
    assert rates[-1] < 0.02


def test_weights_start_the_network_and_are_checked(tmp_path):
    draw(tmp_path / "images", 8)
    trained = make_network(Recipe(dim=8), (1, 16, 16), 4, None)
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": trained.state_dict()}, file)
    mine = one(tmp_path, {"folder": "images"}, {"dim": 8, "weights": True}, file)
    train, _ = mine.data.split("test", 0)
    trainer = Trainer(Trial("mine", "test", "DRSL", {"distance": "cosine"}), mine, train, "cpu")
    for name, weight in trainer.network.state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name])
    assert len(mine.recipe.weights) == 8
    with pytest.raises(InputError, match="give their file with --weights"):
        one(tmp_path, {"folder": "images"}, {"weights": True})
    other = one(tmp_path, {"folder": "images"}, {"dim": 16, "weights": True}, file)
    with pytest.raises(InputError, match=r"it lacks embedding\.bias"):
        Trainer(Trial("mine", "test", "DRSL", {"distance": "cosine"}), other, train, "cpu")
    file.write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read as weights"):
        make_network(Recipe(), (1, 16, 16), 4, file)


@pytest.mark.parametrize(
    ("images", "training", "words"),
    [
        ({"tran": ["x"]}, {}, "did you mean train"),
        ({}, {"epoch": 3}, "did you mean epochs"),
        ({"size": [8, 8]}, {}, "give two of 16 or more"),
        ({"folds": 1}, {}, "folds 1: give 2 or more"),
        ({}, {"identities": 1}, "give 2 or more"),
        ({}, {"epochs": "many"}, "must be of the kind of 40"),
        ({}, {"augmentation": "wild"}, "none, weak, strong"),
        ({}, {"network": "conv5"}, "conv5"),
        ({"draw": 8}, {}, "some must be tested on"),
        ({"test": ["images"]}, {}, "test needs train"),
        ({"train": ["images"], "test": ["images"]}, {}, "never trained on"),
    ],
)
def test_a_wrong_description_is_refused(images, training, words, tmp_path):
    draw(tmp_path / "images", 8)
    with pytest.raises(InputError, match=words):
        mine = one(tmp_path, images, training)
        make_network(mine.recipe, (1, 16, 16), 4, None)


def test_a_set_that_is_not_there_is_refused(tmp_path):
    file = write(tmp_path, mine={})
    with pytest.raises(InputError, match="--only other"):
        sets.from_yaml(file, tmp_path, None, ["other"])
    with pytest.raises(InputError, match="cannot be read"):
        sets.from_yaml(tmp_path / "missing.yaml", tmp_path, None)


def test_our_own_file_describes_what_there_is(tmp_path):
    """Its data are not in the repository, so that only what is described is read."""
    for name, described in yaml.safe_load(OURS.read_text()).items():
        assert set(described) <= {"images", "training"}
        source = sets.Source(**sets._fields(name, described["images"], sets.Source))
        training = {key: value for key, value in described["training"].items() if key != "weights"}
        sets.check_recipe(name, Recipe(**sets._fields(name, training, Recipe)))
        assert source.folds >= 2 and source.seeds >= 3
