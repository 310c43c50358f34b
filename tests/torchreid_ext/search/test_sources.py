"""What a folder, a CSV file or a data set holds is listed with the names that it carries."""

import os
import re
import warnings

import pytest
import torchreid
from PIL import Image

from pml_drsl.checks import InputError
from torchreid_ext.config import build_datamanager, get_default_config
from torchreid_ext.search.sources import list_queries, list_sources, shown, test_images


def draw(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 8)).save(folder / name)
    return str(folder)


def short(entries):
    return [(os.path.basename(entry.path), entry.identity, entry.camera) for entry in entries]


def test_the_layout_of_market1501(tmp_path):
    folder = draw(
        tmp_path / "Market",
        "query/0001_c1s1_1_00.jpg",
        "bounding_box_test/0001_c2s1_1_00.jpg",
        "bounding_box_test/-1_c2s1_1_00.jpg",
        "bounding_box_test/0000_c2s1_1_00.jpg",
        "bounding_box_train/0009_c2s1_1_00.jpg",
    )
    (tmp_path / "Market" / "query" / "Thumbs.db").write_bytes(b"")
    images = list_sources([folder])
    assert short(images.query) == [("0001_c1s1_1_00.jpg", "0001", "1")]
    assert short(images.gallery) == [("0000_c2s1_1_00.jpg", "0000", "2"), ("0001_c2s1_1_00.jpg", "0001", "2")]
    left_out = "files of kinds that are not read (1: 'Thumbs.db'); images of junk (1: '-1_c2s1_1_00.jpg')"
    beside = "what is beside the folders query and bounding_box_test (1: 'bounding_box_train')"
    assert images.about_left_out() == f"left out: {left_out}; {beside}"
    # The two folders by themselves say the same.
    apart = list_sources([f"{folder}/bounding_box_test", f"{folder}/query"])
    assert (apart.query, apart.gallery) == (images.query, images.gallery)


def test_folders_of_identities(tmp_path):
    folder = draw(tmp_path / "my photos", "å b/c1_1.png", "å b/c1_2.png", "å b/c2_1.png", "you/c1_1.png")
    assert {row[1:] for row in list_sources([folder]).rows} == {("", "", "gallery")}
    images = list_sources([folder], "folder")
    assert len(images.gallery) == 4 and all(row.identity and row.camera for row in images.rows)
    first = [("c1_1.png", "å b", "c1"), ("c2_1.png", "å b", "c2"), ("c1_1.png", "you", "c1")]
    assert sorted(short(images.query), key=lambda row: (row[1], row[0])) == sorted(first, key=lambda r: (r[1], r[0]))


def test_images_without_names_are_a_gallery(tmp_path):
    images = list_sources([draw(tmp_path / "x", "IMG_1.png", "deep/er/two.JPG")])
    assert short(images.gallery) == [("IMG_1.png", "", ""), ("two.JPG", "", "")]
    assert not images.query


def test_a_csv_file(tmp_path):
    draw(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "list.csv").write_text("path,pid,camid,split\na.png,1,1,query\nb.png,1,2,gallery\nc.png,2,1,train\n")
    images = list_sources([str(tmp_path / "list.csv")])
    assert short(images.query) == [("a.png", "1", "1")] and short(images.gallery) == [("b.png", "1", "2")]
    assert images.left_out == {"images of the split train": [str(tmp_path / "c.png")]}
    # A list that trains with ``cameras: none``.
    (tmp_path / "list.csv").write_text("path,pid,split\na.png,1,query\nb.png,1,gallery\nc.png,2,train\n")
    images = list_sources([str(tmp_path / "list.csv")])
    assert short(images.query) == [("a.png", "1", "")] and short(images.gallery) == [("b.png", "1", "")]
    assert short(list_queries([str(tmp_path / "list.csv")]).rows) == [("a.png", "1", "")]
    (tmp_path / "list.csv").write_text("path,pid,camid,split\nc.png,2,1,train\n")
    with pytest.raises(InputError, match="no image with the split query or gallery"):
        list_sources([str(tmp_path / "list.csv")])


def test_without_cameras_every_photo_of_a_person_is_a_query(tmp_path):
    folder = draw(tmp_path / "x", "anna/IMG_1.png", "anna/IMG_2.png", "ben/PXL_1.png")
    draw(tmp_path, "IMG_1.png")
    (tmp_path / "list.csv").write_text("path,pid,split\nIMG_1.png,a,query\nx/ben/PXL_1.png,b,gallery\n")
    sources = [folder, f"{tmp_path}/list.csv", f"{folder}/ben/PXL_1.png"]
    table = list_sources(sources, "folder", cameras=False)
    assert len(table.query) == 3 + 1 and not any(row.camera for row in table.rows)
    assert len(list_sources([folder], "folder").query) == 2


def test_photos_on_another_drive_of_windows_keep_their_paths(tmp_path, monkeypatch):
    folder = draw(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text("path,pid,camid,split\na.png,1,1,query\nb.png,1,2,gallery\n")

    def other_drive(path, start=os.curdir):
        raise ValueError(f"path is on mount 'C:', start on mount 'D:': {path}, {start}")

    monkeypatch.setattr(os.path, "relpath", other_drive)
    assert shown(f"{folder}/a.png") == f"{folder}/a.png"
    assert [row.path for row in list_sources([f"{folder}/list.csv"]).rows] == [f"{folder}/a.png", f"{folder}/b.png"]


def test_one_identity_in_two_sources_is_one_person_and_names_of_photos_may_repeat(tmp_path):
    both = [draw(tmp_path / name, "1/c1_1.png", "IMG_0001.jpg") for name in ("2023", "2024")]
    assert [row.path for row in list_sources(both).gallery] == [
        os.path.join(folder, name) for folder in both for name in ("1/c1_1.png", "IMG_0001.jpg")
    ]
    for folder in both:
        os.remove(os.path.join(folder, "IMG_0001.jpg"))
    assert short(list_sources(both, "folder").gallery) == [("c1_1.png", "1", "c1")] * 2


def test_a_link_to_an_image_is_no_second_image(tmp_path):
    folder = draw(tmp_path / "photos", "anna/1.png", "anna/2.png", "ben/1.png")
    (tmp_path / "photos" / "anna" / "3.png").symlink_to("2.png")
    (tmp_path / "photos" / "ben" / "2.png").symlink_to("1.png")
    (tmp_path / "2.png").symlink_to("photos/anna/2.png")
    for sources in ([folder], [folder, f"{tmp_path}/2.png"]):
        table = list_sources(sources, "folder")
        expected = [os.path.join(folder, name) for name in ("anna/1.png", "anna/2.png", "ben/1.png")]
        assert [row.path for row in table.gallery] == [row.path for row in table.query] == expected
    # One path of an image in query and gallery, so that no image is a match of itself.
    (tmp_path / "list.csv").write_text("path,pid,split\n2.png,anna,query\nphotos/anna/1.png,anna,gallery\n")
    table = list_sources([f"{tmp_path}/list.csv", folder], "folder")
    assert {row.path for row in table.query} == {row.path for row in table.gallery} and len(table.gallery) == 3
    # The first counts, also an album that shows other people, and where nobody is known.
    (tmp_path / "photos" / "ben" / "3.png").symlink_to("../anna/1.png")
    assert [row.identity for row in list_sources([folder], "folder").gallery] == ["anna", "anna", "ben"]
    (tmp_path / "photos" / "z.png").symlink_to("anna/1.png")
    nobody = list_sources([folder]).gallery
    assert [(row.path, row.identity) for row in nobody] == [(path, "") for path in expected]


def test_albums_inside_the_folders_of_people_are_warned_of(tmp_path):
    folder = draw(tmp_path / "p", *(f"{name}/{year}/1.png" for name in ("anna", "ben") for year in (2023, 2024)))
    with pytest.warns(UserWarning, match=f"{folder}': '2023', the innermost folder, is the identity of 'anna/2023/1"):
        assert {row.identity for row in list_sources([folder], "folder").gallery} == {"2023", "2024"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {row.identity for row in list_sources([folder], "(?P<identity>[^/]+)/.*").gallery} == {"anna", "ben"}
        list_sources([folder])
        list_sources([draw(tmp_path / "m", "query/anna/1.png", "gallery/anna/2.png")], "folder")


def test_files_are_a_gallery(tmp_path, monkeypatch):
    folder = draw(tmp_path / "anna", "hall_1.png", "hall_2.png")
    files = [os.path.join(folder, name) for name in ("hall_1.png", "hall_2.png")]
    table = list_sources(files, "folder")
    assert short(table.gallery) == [("hall_1.png", "anna", "hall"), ("hall_2.png", "anna", "hall")] and not table.query
    assert [row.path for row in list_queries(files).rows] == files
    monkeypatch.chdir(folder)
    assert list_sources(["hall_1.png"], "folder").gallery == [("hall_1.png", "anna", "hall", "gallery")]


def test_an_image_that_several_sources_give_counts_once_with_its_identity(tmp_path, monkeypatch):
    folder = draw(tmp_path / "photos", "anna/hall_1.png", "anna/hall_2.png", "ben/door_1.png")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "list.csv").write_text("path,pid,split\nphotos/anna/hall_1.png,a,gallery\n")
    monkeypatch.chdir(folder)
    whole = sorted(row[1:] for row in list_sources([folder], "folder").rows)
    for others in (["anna/hall_1.png"], ["anna"], ["../photos", "../link"], ["ben/door_1.png"] * 2):
        for sources in ([folder, *others], [*others, folder]):
            table = list_sources(sources, "folder")
            assert sorted(row[1:] for row in table.rows) == whole, sources
            assert len({os.path.realpath(row.path) for row in table.gallery}) == 3
    # The list says who it is, and so does a file's own folder where nothing else does.
    assert short(list_sources(["anna/hall_1.png", f"{tmp_path}/list.csv"], "folder").rows) == [("hall_1.png", "a", "")]
    assert [row[1] for row in short(list_sources(["anna", "anna/hall_1.png"], "folder").rows)] == ["anna", ""]
    # Also as a query, where the list names it in the gallery.
    table = list_sources([f"{tmp_path}/list.csv", folder], "folder")
    assert {row[1:3] for row in table.rows if row.path.endswith("anna/hall_1.png")} == {("a", "")}
    assert len(table.query) == 2 and len(table.gallery) == 3


def test_folders_above_a_query_are_no_identity(tmp_path, monkeypatch):
    folder = draw(tmp_path / "photos", "anna/hall_1.png", "street.png")
    below = list_queries([folder], "folder").rows
    assert short(below) == [("hall_1.png", "anna", "hall"), ("street.png", "", "")]
    monkeypatch.chdir(folder)
    assert list_queries(["."], "folder").rows[0][1:] == below[0][1:]
    for word in ("street.png", os.path.join(folder, "street.png"), "../photos/street.png", "anna/hall_1.png", "anna"):
        assert [row.identity for row in list_queries([word], "folder").rows] == [""]
    # Another pattern matches the name of the file itself.
    for word in ("anna", "anna/hall_1.png"):
        assert list_queries([word], r"(?P<identity>[a-z]+)_\d\.png").rows[0].identity == "hall"


def test_a_pattern_names_queries_as_it_names_the_gallery(tmp_path):
    folder = draw(tmp_path / "photos", "anna/2023/1.png", "ben/2.png", "3.png")
    for names in (r"(?P<identity>[^/]+)/.*", r"(?P<identity>\d)\.png"):
        gallery, queries = list_sources([folder], names).gallery, list_queries([folder], names).rows
        assert [row[:3] for row in queries] == [row[:3] for row in gallery]
    assert {row.identity for row in list_queries([folder], r"(?P<identity>[^/]+)/.*").rows} == {"anna", "ben", ""}


@pytest.mark.parametrize("missing", ["nowhere", "notes.txt", "empty", "texts"])
def test_sources_without_images_are_refused(tmp_path, missing):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=missing):
        list_sources([str(tmp_path / missing)])
    if missing == "notes.txt":
        with pytest.raises(InputError, match=r"nor an image, nor a CSV file: names of images end in \.png .* \.gif"):
            list_sources([str(tmp_path / missing)])
    if missing in ("nowhere", "empty"):
        with pytest.raises(InputError, match=missing):
            list_queries([str(tmp_path / missing)])


@pytest.mark.parametrize("words", [[], ["data.validation", 0.5, "data.identities", 6]], ids=["target", "validation"])
def test_the_test_images_of_a_run_are_those_that_it_tests_on(tmp_path, words):
    trained = [f"bounding_box_train/{pid:04}_c{camera}s1_000000_00.jpg" for pid in range(1, 9) for camera in (1, 2)]
    tested = ["query/0011_c1s1_000000_00.jpg", "bounding_box_test/0011_c2s1_000000_00.jpg"]
    more = [f"images/0000_c1s1_00000{number}_00.jpg" for number in range(3)]
    draw(tmp_path / "data" / "market1501" / "Market-1501-v15.09.15", *trained, *tested, *more)
    config = get_default_config()
    config.data.sources, config.data.targets, config.use_gpu = ["market1501"], ["market1501"], False
    given = {"data.root": "nowhere", "data.workers": 0, "train.batch_size": 4}
    given["market1501.use_500k_distractors"] = True
    config.merge_from_list([word for item in given.items() for word in item] + words)
    found = test_images(config, str(tmp_path / "data"))
    config.data.root = str(tmp_path / "data")
    (loaders,) = build_datamanager(config).test_loader.values()
    for split, rows in (("query", found.query), ("gallery", found.gallery)):
        # Whatever numbers torchreid gives, which are others for people who are held out of the training.
        paths = [path for path, *_ in loaders[split].dataset.data]
        names = [re.match(r"(\d+)_c(\d)", os.path.basename(path)).groups() for path in paths]
        assert [row[:3] for row in rows] == [(path, *name) for path, name in zip(paths, names, strict=True)]
    folders = {os.path.basename(os.path.dirname(row.path)) for row in found.gallery}
    assert folders == ({"bounding_box_train"} if words else {"bounding_box_test", "images"})
    assert (len(found.query), len(found.gallery)) == ((6, 6) if words else (1, 4))


def own_photos(folder, people, *words):
    """The configuration of a run on photos of these people in folders of their names."""
    draw(folder, *(f"{name}/{app}_{shot}.png" for name in people for app in ("IMG", "PXL") for shot in "12"))
    config = get_default_config()
    given = {"data.root": str(folder), "data.workers": 0, "train.batch_size": 4, "use_gpu": False}
    given |= {"datasets.mine.folder": "", "data.sources": ["mine"], "data.targets": ["mine"]}
    config.merge_from_list([*(word for item in given.items() for word in item), *words])
    return config


@pytest.mark.parametrize("cameras", ["names", "none"])
@pytest.mark.parametrize("words", [[], ["data.validation", 0.5]], ids=["target", "validation"])
def test_own_photos_have_the_names_of_people_and_cameras_and_no_numbers(tmp_path, words, cameras):
    people = ["3", "7", "10", "anna", "ben", "0012", "1", "2", "carl", "zoë"]
    if words and cameras == "none":
        words = [*words, "datasets.mine.test_fraction", 0.3]
    config = own_photos(tmp_path, people, "datasets.mine.cameras", cameras, *words)
    found = test_images(config)
    (loaders,) = build_datamanager(config).test_loader.values()
    for split, rows in (("query", found.query), ("gallery", found.gallery)):
        assert [row.path for row in rows] == [path for path, *_ in loaders[split].dataset.data]
        for row in rows:
            folder, name = row.path.split(os.sep)[-2:]
            assert row.identity == folder and row.camera == ("" if cameras == "none" else name.partition("_")[0])
    assert found.query and found.gallery


def test_people_of_two_sources_keep_their_names_and_are_not_mixed_up(tmp_path):
    config = own_photos(tmp_path, [f"north/{name}" for name in ("7", "anna", "1", "x")] + ["south/1", "south/ben"])
    config.merge_from_list(["data.sources", ["north", "south"], "data.targets", ["north"], "data.validation", 0.7])
    config.merge_from_list([word for name in ("north", "south") for word in (f"datasets.{name}.folder", name)])
    config.merge_from_list([word for name in ("north", "south") for word in _all_train(name)])
    names = {}
    for row in test_images(config).gallery:
        names.setdefault(os.path.relpath(row.path, tmp_path).rpartition(os.sep)[0], row.identity)
    plain = {folder: folder.split("/")[1] for folder in names}
    assert len(names) == 4 and len(set(names.values())) == 4
    assert {folder: name.split("/")[-1] for folder, name in names.items()} == plain
    assert all("/" in name for folder, name in names.items() if list(plain.values()).count(plain[folder]) > 1)


def _all_train(name):
    return f"datasets.{name}.train", ["*"], f"datasets.{name}.test", [], f"datasets.{name}.cameras", "names"


@pytest.mark.parametrize("words", [[], ["data.validation", 0.5]], ids=["target", "validation"])
def test_a_random_split_that_shows_people_of_the_training_is_refused(tmp_path, words):
    config = own_photos(tmp_path, "abcdefghij", *words)
    items = build_datamanager(config).train_loader.dataset.train
    folders = {os.path.dirname(path) for path, *_ in items}
    trained = {f"mine/{os.path.basename(folder)}" for folder in folders}
    before = test_images(config, trained=trained)
    assert before == test_images(config)
    for folder in (os.path.dirname(before.gallery[0].path), *folders):  # More photos do not change who is tested.
        draw(tmp_path, os.path.join(folder, "IMG_3.png"))
    assert len(test_images(config, trained=trained).gallery) == len(before.gallery) + 1
    refused = 0
    for name in "klmnopqr":  # Chance may leave the people that were trained on in the training.
        draw(tmp_path, f"{name}/IMG_1.png", f"{name}/PXL_1.png")
        if trained & {f"mine/{row.identity}" for row in test_images(config).gallery}:
            refused += 1
            with pytest.raises(InputError, match="are people that the run was trained on: the photos have changed"):
                test_images(config, trained=trained)
            allowed = config.clone()
            allowed.data.allow_overlap = True
            assert test_images(allowed, trained=trained) == test_images(config)
        else:
            assert test_images(config, trained=trained) == test_images(config)
    assert refused > 3


def test_a_target_that_is_not_there(tmp_path):
    config = get_default_config()
    config.data.root = str(tmp_path / "root")
    config.merge_from_list(["datasets.mine.folder", "photos", "data.sources", "mine", "data.targets", "mine"])
    for share in (0, 0.5):
        config.data.validation = share
        with pytest.raises(InputError, match=r"photos.*--root"):
            test_images(config)
    config.data.type, config.data.validation = "video", 0
    with pytest.raises(InputError, match=r"tracklets of 'mine', .*test\.evaluate True test\.visrank True shows"):
        test_images(config)


def test_a_download_that_fails_is_explained_and_leaves_no_empty_folder(tmp_path, monkeypatch):
    def offline(url, path):
        assert path.startswith(str(tmp_path / "photos"))
        raise OSError("there is no network")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torchreid.data.datasets.dataset, "download_url", offline)
    config = get_default_config()
    config.data.root, config.data.sources, config.data.targets = "~/photos", ["dukemtmcreid"], ["dukemtmcreid"]
    told = r"cannot read dukemtmcreid below data\.root '~/photos': there is no network\. .*--root"
    with pytest.raises(InputError, match=told):
        build_datamanager(config)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("validation", [0, 0.5])
@pytest.mark.parametrize("name", ["dukemtmcreid", "synthetic_pedestrians"])
def test_the_images_of_a_run_are_neither_downloaded_nor_drawn_anew(tmp_path, monkeypatch, name, validation):
    monkeypatch.setattr(torchreid.data.datasets.dataset, "download_url", None)
    config = get_default_config()
    config.data.sources, config.data.targets, config.data.validation = [name], [name], validation
    with pytest.raises(InputError, match=rf"images of {name} are not there: .* --root .* by --gallery to drsl-search"):
        test_images(config, str(tmp_path))
    assert not [*tmp_path.iterdir()]


def test_a_class_of_the_users_own_need_not_read_below_the_root(tmp_path, monkeypatch):
    draw(tmp_path, "1.png", "2.png")

    class Mine(torchreid.data.ImageDataset):
        def __init__(self, root="", **kwargs):
            items = [(str(tmp_path / f"{number}.png"), 0, number) for number in (1, 2)]
            super().__init__(items, items[:1], items[1:], **kwargs)

    monkeypatch.setitem(vars(torchreid.data.datasets)["__image_datasets"], "mine_elsewhere", Mine)
    config = get_default_config()
    config.data.root, config.data.targets = str(tmp_path / "nowhere"), ["mine_elsewhere"]
    assert [row.path for row in test_images(config).query] == [str(tmp_path / "1.png")]


test_images.__test__ = False
