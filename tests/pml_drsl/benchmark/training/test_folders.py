"""Which image files are found below folders, and what their paths say."""

import pytest
from image_folders import draw

from pml_drsl.benchmark.training.folders import find
from pml_drsl.checks import InputError


def identities(*folders):
    return sorted({file.identity.rpartition("/")[2] for file in find(folders)})


def test_identity_folders_may_be_links(tmp_path):
    real = draw(tmp_path / "real", 3)
    linked = tmp_path / "linked"
    linked.mkdir()
    for folder in sorted(real.iterdir()):
        (linked / f"to_{folder.name}").symlink_to(folder)
    assert identities(linked) == ["to_identity00", "to_identity01", "to_identity02"]
    assert len(find([linked])) == len(find([real])) == 18


def test_a_folder_that_two_links_lead_to_is_read_once(tmp_path):
    real = draw(tmp_path / "real", 1)
    (tmp_path / "links").mkdir()
    for name in ("first", "second"):
        (tmp_path / "links" / name).symlink_to(real / "identity00")
    assert identities(tmp_path / "links") == ["first"]


@pytest.mark.parametrize("target", ["..", "../..", "loop"])
def test_a_loop_of_links_is_refused(tmp_path, target):
    folder = draw(tmp_path / "images", 2)
    (folder / "identity01" / "loop").symlink_to(target)
    with pytest.raises(InputError, match="loop"):
        find([folder])


def test_a_link_to_nothing_is_refused(tmp_path):
    folder = draw(tmp_path / "images", 2)
    (folder / "identity09").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="identity09 is a link to nothing"):
        find([folder])


def test_hidden_files_do_not_count(tmp_path):
    folder = draw(tmp_path / "images", 2)
    (folder / "identity01" / "._0.png").write_bytes(b"no image")
    assert len(find([folder])) == 12


def test_the_folder_above_an_identity_is_its_group(tmp_path):
    draw(tmp_path / "a", 1)
    draw(tmp_path / "b", 1)
    found = find([tmp_path], root=tmp_path)
    assert {(file.identity, file.group) for file in found} == {("a/identity00", "a"), ("b/identity00", "b")}


def test_a_pattern_reads_names_and_leaves_out_what_does_not_match(tmp_path):
    folder = draw(tmp_path / "images", 2)
    pattern = r"identity(?P<identity>\d+)/(?P<camera>[0-2])\.png"
    found = find([folder], pattern, folder)
    assert [(file.identity, file.camera) for file in found[:4]] == [("00", "0"), ("00", "1"), ("00", "2"), ("01", "0")]
    for wrong, words in (
        ("nothing", "has no group"),
        ("(?P<identity>x", "regular expression"),
        ("(?P<identity>z)", "z"),
    ):
        with pytest.raises(InputError, match=words):
            find([folder], wrong, folder)
