"""Validation identities, fewer training identities, and images that are trained on and tested on."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from people_folders import draw, make_folder, people
from PIL import Image

from pml_drsl.checks import InputError
from torchreid_ext.cli.train import main
from torchreid_ext.config import build_datamanager, get_default_config
from torchreid_ext.data.validation import check_overlap, hold_out

PEOPLE = [f"p{number:02}" for number in range(10)]


def build(root: Path, **data: Any) -> Any:
    cfg = get_default_config()
    mine = data.pop("mine", {"train": ["train"], "test": ["test"]})
    cfg.merge_from_list(["datasets.mine", mine, "datasets.other", data.pop("other", mine)])
    cfg.merge_from_list(["data.height", "16", "data.width", "8", "data.workers", "0", "train.batch_size", "4"])
    cfg.data.root, cfg.data.sources, cfg.data.targets, cfg.use_gpu = str(root), ["mine"], ["mine"], False
    sampler = data.pop("sampler", "RandomIdentitySampler")
    cfg.sampler.train_sampler, cfg.sampler.num_instances = sampler, 2
    cfg.data.update(data)
    return build_datamanager(cfg)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    make_folder(folder / "train", PEOPLE, ["a", "b"])
    make_folder(folder / "test", ["q0", "q1"], ["a", "b"])
    return folder


def held_out(manager: Any) -> set[str]:
    assert manager.targets == ["validation"]
    return people(manager.test_dataset["validation"]["gallery"])


def test_a_share_of_the_training_identities_is_tested_on_in_place_of_the_targets(root: Path) -> None:
    manager = build(root, validation=0.3, transforms=["random_erase"])
    tested, trained = held_out(manager), people(manager.train_loader.dataset.train)
    assert len(tested) == 3 and trained == set(PEOPLE) - tested
    query, gallery = manager.fetch_test_loaders("validation")
    assert len(gallery) == 3 * 2 * 2 and set(query) <= set(gallery)
    assert [Path(item[0]).name for item in query] == ["a_0.png", "b_0.png"] * 3
    assert list(manager.test_loader) == ["validation"]
    for split, items in (("query", query), ("gallery", gallery)):
        batches = list(manager.test_loader["validation"][split])
        assert [path for batch in batches for path in batch["impath"]] == [item[0] for item in items]
        # Nothing is erased at random, as in training.
        wanted = [manager.transform_te(Image.open(item[0]).convert("RGB")) for item in items]
        assert torch.equal(torch.cat([batch["img"] for batch in batches]), torch.stack(wanted))


@pytest.mark.parametrize("sampler", ["RandomIdentitySampler", "MPerClassSampler", "RandomSampler"])
def test_the_remaining_identities_are_numbered_from_zero_and_drawn_alone(root: Path, sampler: str) -> None:
    manager = build(root, validation=0.3, identities=9, sampler=sampler)
    items = manager.train_loader.dataset.train
    assert manager.num_train_pids == manager.train_loader.dataset.num_train_pids == 6
    assert {item[1] for item in items} == set(range(6)) and manager.num_train_cams == 2
    assert len({(item[1], Path(item[0]).parent.name) for item in items}) == 6
    seen = {path for _ in range(5) for batch in manager.train_loader for path in batch["impath"]}
    assert people((path,) for path in seen) == people(items)
    assert type(manager.train_loader.sampler).__name__ in (sampler, "IdentitySampler", "PerClassSampler")


def test_draws_depend_on_their_seed_alone_and_smaller_draws_are_parts_of_larger_ones(root: Path) -> None:
    draws = [held_out(build(root, validation=0.3, validation_seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1] and len({frozenset(draw) for draw in draws}) > 1
    four, eight = (people(build(root, identities=number).train_loader.dataset.train) for number in (4, 8))
    assert len(four) == 4 and len(eight) == 8 and four < eight
    parts = [build(root, identities=8, validation=0.25, validation_seed=seed) for seed in (0, 5)]
    assert all(held_out(part) | people(part.train_loader.dataset.train) == eight for part in parts)
    assert build(root, identities=8).targets == ["mine"]


def test_a_data_set_may_be_read_from_a_database(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys are no paths, and no numbers of open files."""
    for key in (int, lambda place: ("db.lmdb", place), lambda place: str(place).encode()):
        manager = build(root)
        items = [(key(place), place // 4, place % 2, 0) for place in range(24)]
        manager.train_loader.dataset.train = items
        hold_out(manager, identities=0, share=0.5, seed=0, batch_size=4)
        check_overlap(manager)
        tested = manager.test_dataset["validation"]["gallery"]
        assert sorted(map(str, tested)) == sorted(str(item) for item in items if item in tested) and len(tested) == 12


@pytest.mark.parametrize("tracklets", [False, True])
def test_windows_has_the_same_draw(root: Path, monkeypatch: pytest.MonkeyPatch, tracklets: bool) -> None:
    """Its separator follows the digits, which follow the separator of other systems."""
    held = []
    for separator in ("/", "\\"):
        manager = build(root)
        paths = [f"/photos/anna{pid or ''}/{shot}.jpg" for pid in range(10) for shot in range(4)]
        paths = [path.replace("/", separator) for path in paths]
        items = [((path,) if tracklets else path, place // 4, place % 2, 0) for place, path in enumerate(paths)]
        manager.train_loader.dataset.train = items[::-1]
        with monkeypatch.context() as patch:
            patch.setattr(os, "sep", separator)
            hold_out(manager, identities=8, share=0.5, seed=0, batch_size=4)
        tested = [item[0] for item in manager.test_dataset["validation"]["gallery"]]
        held.append([(path[0] if tracklets else path).replace(separator, "/") for path in tested])
    assert held[0] == held[1]


def test_torchreids_own_layout_and_a_short_run(tmp_path: Path) -> None:
    layout = tmp_path / "market1501" / "Market-1501-v15.09.15"
    for folder, pids in (("bounding_box_train", range(1, 16)), ("query", [20]), ("bounding_box_test", [20])):
        for pid, camera, shot in itertools.product(pids, (1, 2), (1, 2)):
            draw(layout / folder / f"{pid:04}_c{camera}s1_00000{shot}_00.jpg")
    words = "data.height 32 data.width 16 data.workers 0 data.validation 0.25 data.validation_seed 3 data.identities 12"
    run = "model.name osnet_x0_25 model.pretrained False train.max_epoch 1 train.batch_size 8 use_gpu False"
    flags = ["-s", "market1501", "-t", "market1501", "--root", str(tmp_path)]
    assert main([*flags, *words.split(), *run.split(), "data.save_dir", str(tmp_path / "log")]) == 0
    assert list(json.loads((tmp_path / "log" / "metrics.json").read_text())) == ["validation"]


@pytest.mark.parametrize(
    ("shots", "words"),
    [
        (1, r"each of the 3 validation identities has a single image, .*add images, or .*NAME\.min_images: 2"),
        (2, r"each of the 3 validation identities is seen by a single camera, .*set datasets\.NAME\.cameras: none"),
    ],
)
def test_identities_that_are_seen_once(tmp_path: Path, shots: int, words: str) -> None:
    make_folder(tmp_path / "train", PEOPLE, ["a"], shots)
    make_folder(tmp_path / "test", ["q0", "q1"], ["a", "b"])
    with pytest.raises(InputError, match=words):
        build(tmp_path, validation=0.3, sampler="RandomSampler")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"validation": 1.0}, "data.validation must be .* less than 1, got 1.0"),
        ({"validation": -0.1}, "data.validation must be"),
        ({"validation": 0.1}, "data.validation 0.1 of 10 training identities is 1"),
        ({"validation": 0.9}, "is 9: training and validation need two"),
        ({"identities": 11}, "data.identities 11: the sources have 10 training identities"),
        ({"identities": -1}, "data.identities takes whole numbers"),
        ({"identities": 2, "validation": 0.5}, "is 1: training and validation need two"),
    ],
)
def test_a_wrong_share_is_refused(root: Path, data: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(root, **data)


def test_training_without_a_test_set(tmp_path: Path) -> None:
    make_folder(tmp_path, PEOPLE, ["a", "b"])
    mine = {"train": ["*"], "test": []}
    assert len(held_out(build(tmp_path, mine=mine, targets=["nowhere"], validation=0.3))) == 3
    with pytest.raises(InputError, match=r"datasets.mine: the split 'query' has no image.*set data\.validation"):
        build(tmp_path, mine=mine)
    only_tested = {"train": [], "test": ["p00", "p01"]}
    manager = build(tmp_path, mine={"train": ["p0[2-9]"], "test": []}, other=only_tested, targets=["other"])
    assert people(manager.train_loader.dataset.train) == set(PEOPLE[2:])
    assert people(manager.test_dataset["other"]["gallery"]) == {"p00", "p01"}


def test_images_that_are_trained_on_and_tested_on_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", PEOPLE, ["a", "b"])
    links = tmp_path / "links"
    for number, person in enumerate(PEOPLE[:4]):
        links.mkdir(exist_ok=True)
        (links / f"x{number}").symlink_to(tmp_path / "photos" / person)
    lines = [f"{path.relative_to(tmp_path)},{path.parent.name},{path.stem[0]}" for path in links.glob("*/*.png")]
    text = "path,pid,camid,split\n" + "".join(f"{line},{split}\n" for line in lines for split in ("query", "gallery"))
    (tmp_path / "list.csv").write_text(text)
    mine, other = {"folder": "photos", "seed": 1}, {"csv": "list.csv"}
    trained = people(build(tmp_path, mine=mine).train_loader.dataset.train)
    shared = 4 * len(trained & set(PEOPLE[:4]))
    assert shared
    with pytest.raises(InputError, match=rf"{shared} of the 16 test images of 'other' .*data.allow_overlap True"):
        build(tmp_path, mine=mine, other=other, targets=["mine", "other"])
    assert build(tmp_path, mine=mine, other=other, targets=["mine", "other"], allow_overlap=True)
    assert build(tmp_path, mine=mine, combineall=True)


@pytest.mark.parametrize("sources", [["mine", "mine"], ["mine", "other"]])
def test_one_image_in_two_sources_is_refused(root: Path, sources: list[str]) -> None:
    with pytest.raises(InputError, match=r"are one image in two sources.*data.allow_overlap True"):
        build(root, sources=sources)
    assert build(root, sources=sources, allow_overlap=True).num_train_pids == 2 * len(PEOPLE)
