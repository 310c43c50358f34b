"""Data sets by configuration: folders and CSVs, as torchreid's own data manager sees them."""

from __future__ import annotations

import csv
import itertools
import json
import pickle
import re
import shutil
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torchreid
from people_folders import draw, make_folder, people

from pml_drsl.checks import InputError
from torchreid_ext.cli.train import main
from torchreid_ext.config import get_default_config
from torchreid_ext.config.data import check_save_dir
from torchreid_ext.data import splits
from torchreid_ext.data.datasets import ConfiguredDataset, register_datasets
from torchreid_ext.data.splits import make_options, selects

PEOPLE = [f"p{number}" for number in range(8)]


def configured(datasets: dict[str, dict[str, Any]]) -> Any:
    config = get_default_config()
    config.merge_from_list(["datasets", datasets])
    return config.datasets


def load(root: Path, name: str = "mine", verbose: bool = False, **options: Any) -> ConfiguredDataset:
    own = make_options(name, configured({name: options})[name])
    return ConfiguredDataset(name, own, root=str(root), verbose=verbose)


def write_csv(root: Path, rows: Sequence[tuple[str, ...]], columns: str = "path,pid,camid,split") -> None:
    with open(root / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns.split(","), *rows])
    for path, *_ in rows:
        draw(root / path)


GOOD = [
    ("a/1.png", "7", "north", "train"),
    ("a/2.png", "7", "south", "train"),
    ("a/3.png", "900", "south", "train"),
    ("a/4.png", "x-1", "south", "query"),
    ("a/5.png", "x-1", "west", "gallery"),
    ("a/6.png", "x-3", "east", "gallery"),
]


def paths(items: list[tuple[Any, ...]]) -> set[str]:
    return {Path(item[0]).name for item in items}


class TestFolder:
    def test_default_split_is_class_disjoint_and_queries_are_first_images(self, tmp_path: Path) -> None:
        make_folder(tmp_path, [f"p{n}" for n in range(8)], ["left", "right"], shots=3)
        data = load(tmp_path)
        assert len(people(data.train)) == len(people(data.gallery)) == 4
        assert not people(data.train) & people(data.gallery)
        assert {item[1] for item in data.train} == {0, 1, 2, 3} and {item[2] for item in data.train} == {0, 1}
        assert len(data.train) == len(data.gallery) == 4 * 2 * 3
        assert len(data.query) == 4 * 2 and paths(data.query) == {"left_0.png", "right_0.png"}
        number = {Path(item[0]).parent.name: item[1] for item in data.gallery}
        assert all(number[Path(item[0]).parent.name] == item[1] for item in data.query)
        assert people(data.gallery) == {"p1", "p2", "p4", "p5"}  # in every process and version
        assert any(people(load(tmp_path, seed=seed).train) != people(data.train) for seed in range(1, 5))

    def test_fraction_and_min_images(self, tmp_path: Path) -> None:
        make_folder(tmp_path, [f"p{n}" for n in range(10)], ["a", "b"])
        draw(tmp_path / "lone" / "a_0.png")
        data = load(tmp_path, test_fraction=0.2, min_images=2)
        assert len(people(data.train)) == 8 and len(people(data.gallery)) == 2
        assert "lone" not in people(data.train) | people(data.gallery)

    def test_train_test_and_query_cameras_of_omniglots_shape(self, tmp_path: Path) -> None:
        for part, alphabets in (("small1", ["Greek", "Latin"]), ("small2", ["Latin", "Tagalog"])):
            for alphabet in alphabets:
                for character in ("character01", "character02"):
                    for drawer in ("01", "02", "05"):
                        draw(tmp_path / "down" / part / alphabet / character / f"0709_{drawer}.png")
        data = load(
            tmp_path,
            pattern=r"(?:.*/)?(?P<identity>[^/]+/character\d+)/\d+_(?P<camera>\d+)\.png",
            train=["**/small1"],
            test=["**/small2/Tagalog"],
            query_cameras=["01", "02"],
        )
        assert [len({item[1] for item in split}) for split in (data.train, data.query, data.gallery)] == [4, 2, 2]
        assert [len(split) for split in (data.train, data.query, data.gallery)] == [12, 4, 2]
        assert all("/small2/Tagalog/" in item[0] for item in (*data.query, *data.gallery))
        assert paths(data.gallery) == {"0709_05.png"}
        assert {item[2] for item in data.query} | {item[2] for item in data.gallery} == {0, 1, 2}

    def test_selects(self) -> None:
        for entry, path, expected in [
            ("train", "train/1/a_1.png", True),
            ("train", "training/1/a_1.png", False),
            ("train", "more/train/1/a_1.png", False),
            ("**/train", "more/and/more/train/1/a_1.png", True),
            ("**/train", "train/1/a_1.png", True),
            ("*/train", "train/1/a_1.png", False),
            ("./train/", "train/1/a_1.png", True),
            ("train/000[12]", "train/0002/a_1.png", True),
            ("train/000[12]", "train/0003/a_1.png", False),
            ("**/a_1.png", "train/0003/a_1.png", True),
            ("**/(a)", "x/(a)/b", True),
        ]:
            assert selects(entry, path) is expected, (entry, path)

    def test_queries_of_their_own(self, tmp_path: Path) -> None:
        """VeRi's layout, whose queries are in the gallery too, as copies."""
        shots = {"image_train": ("1", "3"), "image_test": ("2", "5"), "image_query": ("2",)}
        for folder, names in shots.items():
            for name, camera in itertools.product(names, (1, 2)):
                draw(tmp_path / folder / f"000{name}_c00{camera}_00000000_0.jpg")
        options = {"pattern": "veri", "train": ["image_train"], "test": ["image_test"]}
        data = load(tmp_path, **options, query=["image_query"])
        assert [{Path(item[0]).parent.name for item in split} for split in (data.train, data.query, data.gallery)] == [
            {folder} for folder in ("image_train", "image_query", "image_test")
        ]
        assert [len(split) for split in (data.train, data.query, data.gallery)] == [4, 2, 4]
        assert {item[1:] for item in data.query} < {item[1:] for item in data.gallery}
        own = make_options("mine", options | {"query": "image_query"})
        assert own.takes("image_query/0002_c001_00000000_0.jpg") and own.query == ["image_query"]

    def test_an_entry_with_brackets_is_a_name_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_folder(tmp_path, ["a [1]", "a 1", "b", "c", "d", "e1"], ["left", "right"])
        with monkeypatch.context() as patch:
            patch.setattr(splits, "selects", None)  # A thousand names would take long to match with every path.
            data = load(tmp_path, train=["a [1]", "./b/left_0.png"], test=["c/", "d"])
        assert (people(data.train), people(data.gallery)) == ({"a [1]", "b"}, {"c", "d"}) and len(data.train) == 5
        data = load(tmp_path, train=["a [1]", "b"], test=["[cd]", "e[1]"])
        assert (people(data.train), people(data.gallery)) == ({"a [1]", "b"}, {"c", "d", "e1"})
        options = make_options("mine", {"train": ["a [1]"], "test": []})
        assert options.takes("a [1]/left_0.png") and not options.takes("a [2]/left_0.png")

    def test_query_without_a_match_warns_with_the_count(self, tmp_path: Path) -> None:
        make_folder(tmp_path, ["p0", "p1", "q0", "q1", "q2"], ["a", "b"])
        make_folder(tmp_path, ["q3", "q4"], ["a"])
        with pytest.warns(UserWarning, match="2 of 8 queries have no match"):
            load(tmp_path, train=["p*"], test=["q*"])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"folder": "absent"}, ["no folder", "absent", "--root"]),
            ({"pattern": r"(?P<identity>\w+)-(?P<camera>\w+)\.gif"}, ["matches the pattern", "gif", "p0/a_0.png"]),
            ({"folder": "p0"}, ["'a_0.png'", "a folder of their own, PERSON/1.jpg; give the folder above as --root"]),
            ({"train": ["p0"], "test": ["p2"]}, ["one identity", "p0"]),
            (
                {"train": ["p0", "p1"], "test": ["p1", "p2"]},
                ["both in training and in test", "p1", "for a random draw"],
            ),
            ({"train": ["p0", "p1"], "test": ["p2", "p3"], "query": ["z"]}, ["mine.query: 'z' selects none"]),
            ({"train": ["p0", "p1"], "test": ["z*"]}, ["'z*'", "selects none"]),
            ({"query_cameras": ["c"]}, ["query_cameras", "'c'", "['a', 'b']"]),
            ({"query_cameras": ["a", "b"]}, ["'gallery'", "no image"]),
            ({"min_images": 99}, ["'train' has no image: give images of more people, or change", "min_images"]),
            ({"junk": [-1, "p1", 7]}, ["no image shows '7', a name of junk: correct or remove it"]),
            (
                {"train": ["p0", 1.5], "test": []},
                ["mine.train' takes None or a list in which every entry is a string, got 1.5", "write it in quotes"],
            ),
            ({"folder": True}, ["mine.folder' takes a list in which", "got True", "write it in quotes"]),
            ({"junk": [None]}, ["mine.junk' takes a list in which", "got None", "write it in quotes"]),
        ],
    )
    def test_errors(self, tmp_path: Path, options: dict[str, Any], words: list[str]) -> None:
        make_folder(tmp_path, ["p0", "p1", "p2", "p3"], ["a", "b"])
        with pytest.raises(ValueError) as caught:
            load(tmp_path, **options)
        assert all(word in str(caught.value) for word in ["mine", *words])


class TestNamesAndCameras:
    @pytest.mark.parametrize(
        ("pattern", "name"),
        [
            ("market", "{pid:04}_c{camera}s1_00000{shot}_00.png"),
            ("msmt17", "{pid:04}/{pid:04}_00{shot}_0{camera}_0303morning_0015_0.png"),
            ("veri", "{pid:04}_c00{camera}_0000{shot}_0.png"),
            ("folder", "{pid:04}/{camera}_{shot}.png"),
            (r"(?P<camera>\d+)/(?P<identity>\d+)-\d\.png", "{camera}/{pid:04}-{shot}.png"),
        ],
    )
    def test_presets_read_what_they_are_called_after(self, tmp_path: Path, pattern: str, name: str) -> None:
        for pid, camera, shot in itertools.product(range(8), (1, 2), (0, 1)):
            draw(tmp_path / name.format(pid=pid, camera=camera, shot=shot))
        table = load(tmp_path, pattern=pattern).table
        assert len(table.of("train")) == 16 and len(table.query) == 8 and not table.left_out
        assert {row.identity for row in table.rows} == {f"{pid:04}" for pid in range(8)}
        assert {row.camera.lstrip("0") for row in table.rows} == {"1", "2"}

    def test_distractors_of_market1501_that_become_a_person_are_warned_of(self, tmp_path: Path) -> None:
        for pid, camera, shot in itertools.product(range(4), (1, 2), (0, 1)):
            draw(tmp_path / ("train" if pid > 1 else "test") / f"{pid:04}_c{camera}s1_00000{shot}_00.png")
            draw(tmp_path / "query" / f"0001_c{camera}s1_000003_00.png")
        options = {"pattern": "market", "train": ["train"], "test": ["test"]}
        with pytest.warns(UserWarning, match=r"mine: 0000, as Market-1501's distractors, is trained on or searched"):
            load(tmp_path, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(tmp_path, **options, query=["query"])

    def test_without_cameras_every_other_image_is_a_match(self, tmp_path: Path) -> None:
        for pid, shot in itertools.product(range(6), range(3)):
            draw(tmp_path / f"p{pid}" / f"{shot}.jpg")
        with pytest.raises(
            InputError, match=r"images whose names carry no camera.*mine\.cameras: none would use \(18: "
        ):
            load(tmp_path)
        data = load(tmp_path, cameras="none")
        assert len(data.train) == len(data.query) == 9 and data.query == data.gallery and data.num_train_pids == 3
        # Evaluation leaves out images of the query's identity and camera: here the query itself alone.
        assert len({item[1:3] for item in data.query}) == 9
        assert load(tmp_path, cameras="none", pattern=r"(?P<identity>\w+)/.*").train == data.train

    def test_without_cameras_the_cure_of_a_lone_image_is_another_image(self, tmp_path: Path) -> None:
        for person in PEOPLE[:4]:
            draw(tmp_path / person / "1.jpg")
        for person in PEOPLE[4:6]:
            make_folder(tmp_path, [person], ["a"])
        options = {"cameras": "none", "train": ["p4", "p5"]}
        with pytest.raises(InputError, match=r"no test person .*'p0': add photos; of a random draw, min_images: 2"):
            load(tmp_path, **options, test=["p[0-3]"])
        with pytest.warns(UserWarning, match=r"1 of 3 queries have no match in the gallery, and evaluation leaves"):
            load(tmp_path, cameras="none", train=["p0", "p1"], test=["p2", "p4"])

    def test_a_test_of_one_person_is_refused_but_not_a_training_beside_it(self, tmp_path: Path) -> None:
        make_folder(tmp_path, PEOPLE[:4], ["a"])
        few = make_options("mine", {"cameras": "none", "test_fraction": 0.3})
        assert len(ConfiguredDataset("mine", few, root=str(tmp_path), verbose=False).train) == 6
        with pytest.raises(
            InputError, match=r"mine: the gallery shows 'p\d' alone.*more people; of a random draw, raise test_fraction"
        ):
            ConfiguredDataset("mine", few, root=str(tmp_path), mode="query", verbose=False)

    def test_a_single_camera_is_refused_with_the_cure(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make_folder(tmp_path, PEOPLE[:4], ["IMG"])
        with pytest.raises(InputError, match=r"no query has a match.*camera 'IMG'.*datasets\.mine\.cameras: none"):
            load(tmp_path)
        assert len(load(tmp_path, cameras="none", verbose=True).query) == 4
        assert "=> mine: cameras do not matter; the table counts each image as a camera" in capsys.readouterr().out

    def test_a_csv_without_cameras(self, tmp_path: Path) -> None:
        write_csv(tmp_path, [(*row[:2], row[3]) for row in GOOD], columns="path,pid,split")
        with pytest.raises(InputError, match=r"line 1: .*no column 'camid'.* set datasets\.mine\.cameras: none$"):
            load(tmp_path, csv="list.csv")
        assert len(load(tmp_path, csv="list.csv", cameras="none").train) == 3

    def test_several_folders_are_one_data_set(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "2023", ["p0", "p1", "p2"], ["a"])
        make_folder(tmp_path / "2024", ["p0", "p1", "p3"], ["b"])
        data = load(tmp_path, folder=["2023", "2024"], train=["p[01]"], test=["p2", "p3"], cameras="none")
        assert len(data.train) == 8 and data.num_train_pids == 2 and people(data.gallery) == {"p2", "p3"}
        # A Mac writes é as e and an accent in the names of files: one name in two forms is one person.
        for folder, accent in (("2023", "\u00e9"), ("2024", "e\u0301")):
            make_folder(tmp_path / folder, [f"jos{accent}"], ["left"])
        options: dict[str, Any] = {"folder": ["2023", "2024"], "cameras": "none", "train": ["p0", "p1"]}
        tested = load(tmp_path, **options, test=["jose\u0301"]).table.gallery
        assert len(tested) == 4 and {row.identity for row in tested} == {"jos\u00e9"}
        left_out = load(tmp_path, **options, test=["p2"], junk=["jose\u0301"]).table.left_out
        assert [*map(len, left_out.values())] == [4]
        assert load(tmp_path, folder=2024, cameras="none").train == load(tmp_path / "2024", cameras="none").train
        with pytest.raises(InputError, match=r"no folder .*2025"):
            load(tmp_path, folder=["2023", "2025"])

    def test_what_is_left_out_is_counted_and_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make_folder(tmp_path, [*PEOPLE[:4], "-1", "blurred"], ["a", "b"])
        for name in ("p1/clip.mp4", "p1/clip2.mp4"):
            (tmp_path / name).write_bytes(b"x")
        draw(tmp_path / "alone.png")
        draw(tmp_path / "lone" / "a_0.png")
        data = load(tmp_path, junk=["-1", "blurred"], min_images=2, verbose=True)
        assert people(data.train) | people(data.gallery) == set(PEOPLE[:4])
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith("=> mine: left out: ") and "images of junk (8: '-1/a_0.png', '-1/a_1.png', ...)" in line
        assert "images whose names do not match the pattern (1: 'alone.png')" in line
        assert "kinds that are not read (2: 'p1/clip.mp4', 'p1/clip2.mp4')" in line
        assert line.endswith("people with fewer than 2 images (1: 'lone')")

    def test_the_recipe_for_ones_own_photos_trains(self, tmp_path: Path) -> None:
        for pid, shot in itertools.product(range(12), range(4)):
            draw(tmp_path / "photos" / f"person {pid}" / f"IMG_{shot}.jpg")
        recipe = Path(__file__).parents[3] / "configs" / "own_data.yaml"
        words = (
            "model.pretrained False use_gpu False train.max_epoch 1 data.workers 0 test.picture 0 test.untrained False"
        )
        options = [*words.split(), "data.save_dir", str(tmp_path / "log"), "model.name", "osnet_x0_25"]
        assert main(["--config-file", str(recipe), "--root", str(tmp_path / "photos"), *options]) == 0
        assert list(json.loads((tmp_path / "log" / "metrics.json").read_text())) == ["mine"]

    def test_a_dry_run_finds_what_would_end_the_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        photos = tmp_path / "photos"
        damaged = [draw(photos / f"person {pid}" / f"{shot}.jpg") for pid in range(12) for shot in range(4)][::4]
        for path in damaged:
            path.write_bytes(path.read_bytes()[:300])
        recipe = Path(__file__).parents[3] / "configs" / "own_data.yaml"
        words = ["model.pretrained", "False", "use_gpu", "False", "data.workers", "0"]
        command = ["--dry-run", "--config-file", str(recipe), "--root", ".", *words]
        monkeypatch.chdir(photos)
        # The pictures of the run would be photos of a person "own_data" from then on.
        for refused in (command, command[1:]):  # A log among the photos would be in the way of the next command.
            assert main(refused) == 2 and not (photos / "log").exists()
            assert "'log/own_data' lies in a folder of datasets.mine" in capsys.readouterr().err
        config = get_default_config()
        own = {"folder": "", "train": ["*"], "test": [], "cameras": "none"}
        config.merge_from_list([word for key, value in own.items() for word in (f"datasets.mine.{key}", value)])
        config.merge_from_list(["data.sources", ["mine"], "data.save_dir", "log/run", "data.root", "."])
        with pytest.raises(InputError, match=r"'log/run' lies in a folder of datasets\.mine"):
            check_save_dir(config)
        # In the folder of the photos itself, batch.png shows nobody, but a picture in a folder there does.
        config.data.save_dir = "."
        with pytest.raises(InputError, match=r"'\.' lies in a folder of datasets\.mine"):
            check_save_dir(config)
        # Hidden folders, and names that the pattern does not match, are no photos.
        for words in (["data.save_dir", ".runs/a"], ["datasets.mine.pattern", "(?P<identity>person [^/]+)/.*"]):
            assert main([*command, *words]) == 2 and "images cannot be read" in capsys.readouterr().err
        assert main([*command, "data.save_dir", "../log"]) == 2
        out, err = capsys.readouterr()
        assert "12 of 48 images cannot be read; the first ten of the reasons are above" in err
        lines = [line for line in out.splitlines() if "it is damaged" in line]
        assert [sum(str(path) in line for path in damaged) for line in lines] == [1] * 10


class TestLinks:
    """Many people keep their images in one place, and link to them from the folders of a data set."""

    def test_a_set_of_links_is_the_set_of_the_folders_behind_them(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "store", ["p0", "p1", "p2", "p3"], ["a", "b"])
        for pid in ("p0", "p1", "p2", "p3"):
            (tmp_path / "set" / pid).parent.mkdir(exist_ok=True)
            (tmp_path / "set" / pid).symlink_to(Path("..", "store", pid))
        (tmp_path / "link_to_set").symlink_to("set")
        direct = load(tmp_path, folder="store")
        for folder in ("set", "link_to_set"):
            linked = load(tmp_path, folder=folder)
            for one, other in ((direct.train, linked.train), (direct.query, linked.query)):
                assert [item[1:3] for item in one] == [item[1:3] for item in other]
                assert [Path(item[0]).resolve() for item in one] == [Path(item[0]).resolve() for item in other]
            assert all(f"/{folder}/" in item[0] for item in linked.train)

    def test_splits_may_link_to_folders_of_the_same_tree(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "all", ["p0", "p1", "q0", "q1"], ["a", "b"], shots=1)
        for split, pids in (("train", ["p0", "p1"]), ("test", ["q0", "q1"])):
            (tmp_path / split).mkdir()
            for pid in pids:
                (tmp_path / split / pid).symlink_to(tmp_path / "all" / pid)
        data = load(tmp_path, train=["train"], test=["test"])
        assert people(data.train) == {"p0", "p1"} and people(data.gallery) == {"q0", "q1"}
        assert (len(data.train), len(data.gallery)) == (4, 4)

    @pytest.mark.parametrize("of_files", [False, True])
    def test_an_image_that_two_paths_reach_counts_once(self, tmp_path: Path, of_files: bool) -> None:
        make_folder(tmp_path / "all", ["p0", "p1", "p2", "p3"], ["a", "b"], shots=1)
        again = tmp_path / "again"
        again.mkdir()
        if of_files:
            (again / "p0").mkdir()
            (again / "p0" / "a_0.png").symlink_to(tmp_path / "all" / "p0" / "a_0.png")
        else:
            (again / "p0").symlink_to(tmp_path / "all" / "p0")
        data = load(tmp_path)
        assert len(data.train) + len(data.gallery) == 8
        with pytest.raises(InputError, match="'train' has no image"):
            load(tmp_path, min_images=3)

    def test_an_image_with_two_identities_is_refused(self, tmp_path: Path) -> None:
        make_folder(tmp_path, ["p0", "p1", "p2", "p3"], ["a", "b"])
        (tmp_path / "p9").symlink_to("p1")
        with pytest.raises(InputError) as caught:
            load(tmp_path)
        assert all(word in str(caught.value) for word in ["mine", "p1/a_0.png", "p9/a_0.png", "remove one"])
        for cameras, words in (("names", r"\(p1, a and p9, a\)"), ("none", r"\(p1 and p9\)")):
            with pytest.raises(InputError, match=f"identities or cameras differ {words}"):
                load(tmp_path, cameras=cameras)

    @pytest.mark.parametrize(
        ("link", "target", "words"),
        [
            ("p1/up", "..", ["p1/up", "a folder above it"]),
            ("p1/here", ".", ["p1/here", "a folder above it"]),
            ("p1/itself", "itself", ["p1/itself", "cannot be found"]),
            ("p7", "lost", ["p7", "'lost'", "cannot be found"]),
            ("p1/a_9.png", "lost.png", ["a_9.png", "'lost.png'", "cannot be found"]),
        ],
    )
    def test_a_loop_or_a_broken_link_is_named(self, tmp_path: Path, link: str, target: str, words: list[str]) -> None:
        make_folder(tmp_path, ["p0", "p1", "p2", "p3"], ["a", "b"])
        (tmp_path / link).symlink_to(target)
        with pytest.raises(InputError) as caught:
            load(tmp_path)
        assert all(word in str(caught.value) for word in words)

    def test_a_loop_of_two_links_is_named(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "set", ["p0", "p1"], ["a"])
        make_folder(tmp_path / "other", ["p2", "p3"], ["a"])
        (tmp_path / "set" / "more").symlink_to("../other")
        (tmp_path / "other" / "back").symlink_to("../set")
        with pytest.raises(InputError, match="more/back is a link to"):
            load(tmp_path, folder="set")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"foldr": "x"}, ["'foldr'", "'folder'"]),
            ({"csv": "a.csv", "folder": "x"}, ["csv", "folder", "give the data set another name"]),
            ({"train": ["a"]}, ["only one of train and test"]),
            ({"train": ["a"], "test": ["b"], "seed": 1}, ["remove test_fraction and seed"]),
            ({"query_cameras": []}, ["query_cameras takes a list of one or more", "[]"]),
            ({"test_fraction": 1}, ["test_fraction must be greater than 0 and less than 1, got 1"]),
            ({"test_fraction": True}, ["test_fraction' takes a number, such as 0.5, got True"]),
            ({"seed": -1}, ["seed", "-1"]),
            ({"min_images": 0}, ["min_images", "got 0"]),
            ({"pattern": "("}, ["regular expression"]),
            ({"pattern": "markt"}, ["pattern 'markt'", "market, msmt17, veri, folder"]),
            ({"pattern": "(?P<identity>a)"}, ["(?P<camera>...)", "cameras: none"]),
            ({"cameras": "some"}, ["cameras must be one of names, none", "'some'"]),
            ({"cameras": "none", "query_cameras": ["a"]}, ["query_cameras and cameras: none"]),
            (
                {"train": ["a"], "test": ["b"], "query": ["c"], "query_cameras": ["a"]},
                ["query_cameras and query, which contradict"],
            ),
            ({"query": ["c"]}, ["query without test, which is its gallery: give train and test too"]),
        ],
    )
    def test_a_wrong_option_is_named_and_nothing_registered(self, options: dict[str, Any], words: list[str]) -> None:
        good, bad = f"good_{uuid.uuid4().hex}", f"bad_{uuid.uuid4().hex}"
        with pytest.raises(ValueError) as caught:
            register_datasets(configured({good: {}, bad: options}))
        assert all(word in str(caught.value) for word in [bad, *words])
        with pytest.raises(ValueError, match="Invalid dataset name"):
            torchreid.data.datasets.init_image_dataset(good)

    @pytest.mark.parametrize("name", ["market1501", "synthetic_pedestrians"])
    def test_a_name_torchreid_has(self, name: str) -> None:
        with pytest.raises(ValueError, match=name):
            register_datasets({name: {}})


class TestCsv:
    def test_any_names_become_numbers_and_a_camera_has_one_number_everywhere(self, tmp_path: Path) -> None:
        write_csv(tmp_path, GOOD)
        data = load(tmp_path, csv="list.csv")
        splits = (data.train, data.query, data.gallery)
        assert [[(Path(item[0]).name, item[1], item[2]) for item in split] for split in splits] == [
            [("1.png", 0, 0), ("2.png", 0, 1), ("3.png", 1, 1)],
            [("4.png", 0, 1)],
            [("5.png", 0, 3), ("6.png", 1, 2)],
        ]

    def test_paths_are_relative_to_the_csv_and_a_byte_order_mark_is_no_matter(self, tmp_path: Path) -> None:
        below = tmp_path / "below"
        below.mkdir()
        write_csv(below, GOOD)
        text = (below / "list.csv").read_text()
        (below / "list.csv").write_text("\ufeff" + text, encoding="utf-8")
        assert len(load(tmp_path, csv="below/list.csv").train) == 3
        (below / "list.csv").rename(below / "2024")
        assert len(load(below, csv=2024).train) == 3

    def test_junk_that_no_row_names_is_refused(self, tmp_path: Path) -> None:
        write_csv(tmp_path, GOOD)
        assert len(load(tmp_path, csv="list.csv", junk=["x-3", -1]).gallery) == 1
        with pytest.raises(InputError, match=r"list\.csv: no image shows 'x3', a name of junk"):
            load(tmp_path, csv="list.csv", junk=["x3"])

    def test_an_image_may_be_both_query_and_gallery(self, tmp_path: Path) -> None:
        write_csv(tmp_path, [*GOOD, ("a/4.png", "x-1", "south", "gallery")])
        data = load(tmp_path, csv="list.csv")
        assert paths(data.query) <= paths(data.gallery)

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            (("a/./1.png", "7", "north", "train"), ["twice"]),
            (("a/4.png", "x-2", "south", "gallery"), ["twice"]),
            (("a/1.png", "7", "north", "gallery"), ["twice"]),
            (("a/9.png", "7", "north", "gallery"), ["both in training and in test", "'7'"]),
        ],
    )
    def test_a_wrong_row(self, tmp_path: Path, row: Any, words: list[str]) -> None:
        write_csv(tmp_path, [*GOOD, row])
        with pytest.raises(ValueError) as caught:
            load(tmp_path, csv="list.csv")
        assert all(word in str(caught.value) for word in words)

    def test_a_missing_csv(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no CSV .*list\.csv"):
            load(tmp_path, csv="list.csv")

    @pytest.mark.parametrize(
        ("kept", "words"),
        [
            (lambda row: row[3] != "query", "'query' has no image"),
            (lambda row: row[3] != "gallery", "'gallery' has no image"),
            (lambda row: row[1] != "900", "one identity, '7'"),
        ],
    )
    def test_an_incomplete_list(self, tmp_path: Path, kept: Any, words: str) -> None:
        write_csv(tmp_path, [row for row in GOOD if kept(row)])
        with pytest.raises(ValueError, match=words):
            load(tmp_path, csv="list.csv")


class TestInTorchreid:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_data_manager_reads_it_and_a_name_takes_new_options(self, tmp_path: Path, workers: int) -> None:
        name = f"set_{uuid.uuid4().hex}"
        make_folder(tmp_path / "one", [f"p{n}" for n in range(4)], ["a", "b"])
        make_folder(tmp_path / "two", [f"p{n}" for n in range(12)], ["a", "b"])
        for folder, count in (("one", 2), ("two", 6)):
            register_datasets({name: {"folder": folder}})
            manager = torchreid.data.ImageDataManager(
                root=str(tmp_path), sources=name, height=16, width=8, batch_size_train=4, workers=workers, use_gpu=False
            )
            assert manager.num_train_pids == count
            batch = next(iter(manager.train_loader))
            assert batch["img"].shape == (4, 3, 16, 8) and int(batch["pid"].max()) < count
        assert pickle.loads(pickle.dumps(manager.train_loader.dataset)).train == manager.train_loader.dataset.train

    def test_combineall_takes_each_image_once(self, tmp_path: Path) -> None:
        make_folder(tmp_path, [f"p{n}" for n in range(6)], ["a", "b"])
        data = ConfiguredDataset("mine", make_options("mine", {}), root=str(tmp_path), combineall=True, verbose=False)
        assert len(data.train) == len({item[0] for item in data.train}) == 24
        assert {item[1] for item in data.train} == set(range(6)) and data.num_train_pids == 6
        by_folder = {(Path(item[0]).parent.name, item[1]) for item in data.train}
        assert len(by_folder) == 6

    def test_sets_that_only_train_come_first_of_several(self, tmp_path: Path) -> None:
        one, more, two = (f"set_{uuid.uuid4().hex}" for _ in range(3))
        make_folder(tmp_path / "one", ["x0", "x1"], ["a", "b"])
        make_folder(tmp_path / "two", [f"p{n}" for n in range(6)], ["a", "b"])
        make_folder(tmp_path / "more", ["y0", "y1"], ["a"])
        trains = {"train": ["*"], "test": []}
        register_datasets({one: {"folder": "one"} | trains, more: {"folder": "more"} | trains, two: {"folder": "two"}})
        sources = {"root": str(tmp_path), "sources": [one, more, two], "targets": two}
        manager = torchreid.data.ImageDataManager(**sources, height=16, width=8, batch_size_train=4, use_gpu=False)
        assert manager.num_train_pids == 2 + 2 + 3
        dataset = manager.train_loader.dataset
        assert [item[3] for item in dataset.train] == [0] * 8 + [1] * 4 + [2] * 12
        tested = manager.test_loader[two]["gallery"].dataset
        assert {Path(item[0]).parts[-3] for item in tested.gallery} == {"two"}

    @pytest.mark.parametrize("above", ["", "my photos/"])
    def test_folders_inside_those_of_people_are_warned_of(self, tmp_path: Path, above: str) -> None:
        albums = ("anna/beach", "anna/home", "ben/office", "ben/gym", "cleo/trip", "dora/zoo")
        layouts = {
            "albums": (albums, "'beach', the innermost folder, is the identity of '{}anna/beach/a_0.png'"),
            "one": (("anna", "ben", "cleo", "anna/raw/day1"), "'day1', the innermost .* of '{}anna/raw/day1/a_0.png'"),
            "splits": (("train/a", "train/b", "test/c", "test/d"), "'c', .*; if it names a split, set train and test"),
        }
        for name, (folders, words) in layouts.items():
            make_folder(tmp_path / name / above, folders, ["a", "b"])
            with pytest.warns(UserWarning, match=f"datasets.mine: {words.format(above)}") as caught:
                load(tmp_path / name)
            assert len(caught) == 1
        (pattern,) = re.findall("set pattern .*? to '(.*?)'", str(caught[0].message))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = load(tmp_path / "albums", pattern=pattern, cameras="none")
        assert {row.identity for row in data.table.rows} == {"anna", "ben", "cleo", "dora"}

    def test_good_data_gives_no_warning(self, tmp_path: Path) -> None:
        make_folder(tmp_path / "photos", [f"p{n}" for n in range(6)], ["a", "b"])
        make_folder(tmp_path / "more", ["p6", "p7"], ["a", "b"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for folder in ("photos", ["photos", "more"]):
                load(tmp_path, folder=folder)
            load(tmp_path, train=["photos"], test=["more"])
            shutil.rmtree(tmp_path / "more")
            load(tmp_path)  # Nobody is called photos, because every photo would show him.
