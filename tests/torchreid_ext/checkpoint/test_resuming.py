"""A resumed run prints the configuration keys that changed, and refuses changes that cannot be."""

import ntpath
import os

import pytest

from torchreid_ext import get_default_config
from torchreid_ext.checkpoint import states
from torchreid_ext.config import KEYS, flat


def changed(**values):
    return flat(get_default_config()) | {key.replace("__", "."): value for key, value in values.items()}


def compare(saved, current):
    return states.compare(saved, current, {key: entry.on_resume for key, entry in KEYS.items()})


def test_equal_configurations_have_no_differences():
    assert compare(changed(), changed(model__resume="auto", data__save_dir="elsewhere")) == []


def test_differences_are_listed():
    now = changed(train__lr=0.1, train__max_epoch=99, test__ranks=[1])
    assert compare(changed(), now) == [
        "test.ranks: [1, 5, 10, 20] -> [1]",
        "train.lr: 0.0003 -> 0.1 (the checkpoint's is kept)",
        "train.max_epoch: 60 -> 99",
    ]
    # One of the two versions of this package does not have this key.
    assert compare({}, {"new.key": 1}) == ["new.key: None -> 1"]


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"model__name": "osnet_x1_0"}, "model.name: 'resnet50' -> 'osnet_x1_0'"),
        ({}, {"train__optim": "sgd", "loss__name": "drsl"}, "loss.name: .*; train.optim: 'adam' -> 'sgd'"),
        ({}, {"data__sources": ["toy"]}, r"data.sources: \['market1501'\] -> \['toy'\]"),
        (
            {"train__lr_scheduler": "cosine"},
            {"train__lr_scheduler": "cosine", "train__max_epoch": 9},
            "train.max_epoch",
        ),
        ({"datasets__market1501": {"a": 1}}, {"datasets__market1501": {"a": 2}}, "datasets.market1501"),
    ],
)
def test_a_change_of_a_fixed_key_is_refused(before, now, message):
    with pytest.raises(ValueError, match=f"cannot resume with another {message}.*Set it back"):
        compare(changed(**before), changed(**now))


def test_images_on_two_drives_of_windows_have_a_digest(monkeypatch):
    elsewhere = states.digest([("/photos/a/1.jpg", 0), ("/photos/b/2.jpg", 1)])
    monkeypatch.setattr(os, "sep", "\\")
    for name in ("abspath", "commonpath", "dirname", "relpath"):
        monkeypatch.setattr(os.path, name, getattr(ntpath, name))
    one, two = ("C:\\photos\\a\\1.jpg", 0), ("C:\\photos\\b\\2.jpg", 1)
    moved = [("D:\\new\\a\\1.jpg", 0), ("D:\\new\\b\\2.jpg", 1)]
    apart = [one, moved[1]]
    assert states.digest([one, two]) == states.digest(moved) == elsewhere != states.digest(apart)
    assert states.digest(apart) == states.digest(apart[::-1]) != states.digest([one, ("D:\\new\\b\\3.jpg", 1)])


def test_every_key_says_what_a_resumed_run_does_in_a_known_word():
    assert {entry.on_resume for entry in KEYS.values()} == {"fixed", "kept", "free", ""}
