"""Every kind of image gives the features that torchreid's own test transforms give."""

import numpy as np
import pytest
import torch
import torchreid
from PIL import Image
from torchvision import transforms

from pml_drsl.checks import InputError
from torchreid_ext.config import get_default_config
from torchreid_ext.search.model import Preprocessing, as_list

torchreid_transforms = torchreid.data.transforms


@pytest.fixture
def preprocessing():
    config = get_default_config()
    config.data.norm_mean = [0.3, 0.4, 0.5]
    config.data.height, config.data.width = 24, 12
    return Preprocessing(config)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 30, 3), dtype=np.uint8))


def expected(image):
    _, test = torchreid_transforms.build_transforms(24, 12, norm_mean=[0.3, 0.4, 0.5])
    return test(image)


def test_paths_pictures_arrays_and_tensors_give_what_torchreid_gives(preprocessing, picture, tmp_path):
    picture.save(tmp_path / "a picture.png")
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    kinds = [str(tmp_path / "a picture.png"), tmp_path / "a picture.png", picture, np.array(picture), tensor]
    for image in kinds:
        assert torch.equal(preprocessing(image), expected(picture))


def test_grey_pictures_become_rgb(preprocessing, picture):
    grey = picture.convert("L")
    for image in (grey, np.array(grey)):
        assert torch.equal(preprocessing(image), expected(grey.convert("RGB")))


def test_floating_tensors_of_the_right_size_are_only_normalised(preprocessing):
    image = torch.rand(3, 24, 12)
    normalised = transforms.Normalize([0.3, 0.4, 0.5], [0.229, 0.224, 0.225])(image)
    assert torch.equal(preprocessing(image), normalised)
    large = torch.rand(3, 48, 24)
    # One byte a value is what a picture can hold.
    as_picture = Image.fromarray((large * 255).round().byte().permute(1, 2, 0).numpy())
    assert (preprocessing(large) - expected(as_picture)).abs().max() < 0.02


def test_a_crop_is_that_part_of_the_picture(preprocessing, picture):
    part = Image.fromarray(np.array(picture)[10:40, 5:20])
    assert torch.equal(preprocessing(picture, (5, 10, 20, 40)), expected(part))
    tensor = torch.rand(3, 40, 30)
    assert torch.equal(preprocessing(tensor, (5, 10, 17, 34)), preprocessing(tensor[:, 10:34, 5:17]))


@pytest.mark.parametrize("crop", [(0, 0, 31, 50), (-1, 0, 5, 5), (5, 5, 5, 9), (9, 5, 5, 9)])
def test_a_crop_outside_the_picture_is_refused(preprocessing, picture, crop):
    with pytest.raises(InputError, match="30 pixels wide and 50 high"):
        preprocessing(picture, crop)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((5, 5, 4), np.uint8), r"\[5, 5, 4\]"),
        (np.zeros((5, 5, 3)), "float64"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (torch.zeros(1, 5, 5), r"\[1, 5, 5\]"),
        (torch.zeros(3, 5, 5, dtype=torch.int64), "int64"),
        (torch.randn(3, 9, 9), "normalised here"),
        (torch.full((3, 5, 5), float("nan")), "nan"),
        (17, "a int is not an image"),
    ],
)
def test_what_is_no_image_is_refused(preprocessing, image, words):
    with pytest.raises(InputError, match=words):
        preprocessing(image)


def test_a_decompression_bomb_is_refused(preprocessing, tmp_path, monkeypatch):
    Image.new("L", (3000, 3000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(InputError, match=r"bomb.png.*too large"):
        preprocessing(tmp_path / "bomb.png")


def test_one_image_several_images_and_a_batch_become_a_list(picture):
    assert len(as_list("a.png")) == len(as_list(picture)) == len(as_list(np.zeros((5, 5, 3), np.uint8))) == 1
    assert len(as_list(torch.zeros(4, 3, 5, 5))) == 4 and len(as_list([picture, "a.png"])) == 2
