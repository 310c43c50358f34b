"""What a folder, a CSV file or a data set holds is listed with the names that it carries."""

import os

import pytest
from PIL import Image

from pml_drsl.checks import InputError
from torchreid_ext.config import get_default_config
from torchreid_ext.search.sources import list_queries, list_sources, test_images


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
    left_out = "1 files that are no images ('Thumbs.db'); 1 images of junk ('-1_c2s1_1_00.jpg')"
    assert images.about_left_out() == f"left out: {left_out}"
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
    (tmp_path / "list.csv").write_text("path,pid,camid,split\nc.png,2,1,train\n")
    with pytest.raises(InputError, match="no image with the split query or gallery"):
        list_sources([str(tmp_path / "list.csv")])


def test_two_galleries_with_the_same_names_are_refused(tmp_path):
    both = [draw(tmp_path / name, "1/c1_1.png") for name in ("north", "south")]
    with pytest.raises(InputError, match=r"both have a query image '1/c1_1.png'.*below one folder"):
        list_sources(both, "folder")
    assert len(list_sources([str(tmp_path)]).gallery) == 2


def test_files_are_a_gallery_and_a_folder_of_queries_is_as_good_as_its_files(tmp_path):
    folder = draw(tmp_path / "anna", "hall_1.png", "hall_2.png")
    files = [os.path.join(folder, name) for name in ("hall_1.png", "hall_2.png")]
    table = list_sources(files, "folder")
    assert short(table.gallery) == [("hall_1.png", "anna", "hall"), ("hall_2.png", "anna", "hall")] and not table.query
    assert list_queries([folder], "folder") == list_queries(files, "folder") != list_queries(files)
    assert [row.path for row in list_queries(files)] == files and {row.identity for row in list_queries(files)} == {""}


@pytest.mark.parametrize("missing", ["nowhere", "notes.txt", "empty", "texts"])
def test_sources_without_images_are_refused(tmp_path, missing):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=missing):
        list_sources([str(tmp_path / missing)])


def test_a_target_that_is_not_there(tmp_path):
    config = get_default_config()
    config.data.root = str(tmp_path / "root")
    config.merge_from_list(["datasets.mine.folder", "photos", "data.targets", "mine"])
    with pytest.raises(InputError, match="photos"):
        test_images(config)
    config.data.type = "video"
    with pytest.raises(InputError, match="video"):
        test_images(config)


test_images.__test__ = False
