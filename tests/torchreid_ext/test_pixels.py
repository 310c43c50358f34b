"""One reader of images: upright photos, 16 bits, transparency, and what is refused."""

from __future__ import annotations

import builtins
import errno
import io
import os
import runpy
import struct
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, features

from pml_drsl.checks import InputError
from torchreid_ext import pixels
from torchreid_ext.pixels import NoAccess, is_image, read_image

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (20, 10, 3), dtype=np.uint8)
GREY = COLOURS[:, :, 0]

# What a camera stores of an upright picture, by its EXIF orientation (JEITA CP-3451, tag 274): a flip of the columns
# or the rows, or a turn.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright.swapaxes(0, 1)[::-1],
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],
}


def saved(folder: Path, image: Image.Image, name: str = "x.png", **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_photo_is_turned_upright_once(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    for exif[274], stored in STORED.items():
        turned = Image.fromarray(np.ascontiguousarray(stored(COLOURS)))
        path = saved(tmp_path, turned, f"x.{suffix}", exif=exif)
        for image in (path, Image.open(path), read_image(path)):
            assert np.array_equal(read_image(image), COLOURS), exif[274]


@pytest.mark.parametrize("odd", [(256, 7, b"\x10"), (282, 2, b"72")], ids=["size", "dpi"])
def test_a_photo_with_odd_tags_beside_its_orientation_is_turned_upright(
    tmp_path: Path, odd: tuple[int, int, bytes]
) -> None:
    entries = [(274, 3, 1, struct.pack("<HH", 6, 0)), (odd[0], odd[1], len(odd[2]), odd[2].ljust(4, b"\0"))]
    tags = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(STORED[6](COLOURS))), exif=exif)
    assert np.array_equal(read_image(path), COLOURS)


def test_a_file_that_makes_pillow_raise_any_error_is_damaged() -> None:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "TIFF")
    for kind in (2, 5, 7, 11):
        # The type of a number is that of a text or of a fraction: Pillow finds it out as a TypeError.
        damaged = file.getvalue().replace(struct.pack("<HH", 273, 4), struct.pack("<HH", 273, kind))
        assert damaged != file.getvalue()
        with pytest.raises(InputError, match="damaged"):
            read_image(damaged)


def test_a_damaged_image_of_pillow_that_is_not_decoded_yet_is_refused() -> None:
    file = io.BytesIO()
    Image.fromarray(COLOURS).resize((64, 64)).save(file, "PNG")
    image = Image.open(io.BytesIO(file.getvalue()[:-200]))
    with pytest.raises(InputError, match=r"cannot read image that was given: it is damaged \("):
        read_image(image)


def test_a_damaged_orientation_is_none(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(COLOURS), exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff")
    assert np.array_equal(read_image(path), COLOURS)


def test_ordinary_images_are_what_pillow_and_so_torchreid_reads(tmp_path: Path) -> None:
    for mode in ("RGB", "L", "P", "1", "CMYK"):
        path = saved(tmp_path, Image.fromarray(COLOURS).convert(mode), "x.tif")
        assert np.array_equal(read_image(path), Image.open(path).convert("RGB")), mode


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_its_8_bit_twin(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path, Image.fromarray(GREY.astype(np.uint16) * 257), f"x.{suffix}")
    twin = read_image(GREY)
    assert np.array_equal(read_image(path), twin) and np.array_equal(twin, np.stack([GREY] * 3, 2))
    assert np.array_equal(read_image(Image.open(path)), twin)


def test_16_bit_arrays_are_scaled() -> None:
    assert np.array_equal(read_image(COLOURS.astype(np.uint16) * 257), COLOURS)
    steps = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)
    assert np.asarray(read_image(steps))[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]


def test_hidden_colours_do_not_count_and_visible_ones_stay(tmp_path: Path) -> None:
    alpha = np.where(np.arange(10) < 5, 0, 255).astype(np.uint8)[None].repeat(20, 0)
    expected = np.where(alpha[:, :, None] == 0, 255, COLOURS)
    image = Image.fromarray(COLOURS)
    image.putalpha(Image.fromarray(alpha))
    assert np.array_equal(read_image(saved(tmp_path, image)), expected)
    grey = Image.fromarray(GREY)
    grey.putalpha(Image.fromarray(alpha))
    assert np.array_equal(read_image(saved(tmp_path, grey)), np.stack([np.where(alpha == 0, 255, GREY)] * 3, 2))
    for values, hidden in ((GREY, int(GREY[0, 0])), (GREY.astype(np.uint16) * 257, int(GREY[0, 0]) * 257)):
        path = saved(tmp_path, Image.fromarray(values), transparency=hidden)
        assert np.array_equal(np.asarray(read_image(path))[:, :, 0], np.where(values == hidden, 255, GREY))
    half = Image.new("RGBA", (2, 2), (100, 0, 0, 51))
    assert read_image(half).getpixel((0, 0)) == (224, 204, 204)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(tmp_path: Path, kind: type) -> None:
    image = Image.fromarray(GREY.astype(kind))
    with pytest.raises(InputError, match=r"x\.tif.*black and white are not defined"):
        read_image(saved(tmp_path, image, "x.tif"))
    with pytest.raises(InputError, match="not defined"):
        read_image(image)
    with pytest.raises(InputError, match=np.dtype(kind).name):
        read_image(GREY.astype(kind))


def test_the_given_picture_stays_as_it_is() -> None:
    image = Image.fromarray(COLOURS)
    image.getexif()[274] = 6
    assert read_image(image).size == (20, 10) and image.size == (10, 20)


def test_a_photo_of_too_many_pixels_has_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path, Image.fromarray(COLOURS), "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 66)  # Twice as many are read, and the photo has 200.
    size = r"it has more than 0\.000132 megapixels"
    with pytest.raises(InputError, match=rf"x\.png': it is too large \({size}\); make it smaller$"):
        read_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    with warnings.catch_warnings(record=True) as warned:
        warnings.resetwarnings()
        read = runpy.run_path(pixels.__file__)["read_image"]
        assert np.array_equal(read(file), COLOURS) and not warned
        warnings.simplefilter("error")  # A program that fears such a photo is heard.
        with pytest.raises(Exception, match="decompression bomb"):
            read(file)


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(tmp_path, Image.fromarray(COLOURS))
    for code in (errno.EACCES, errno.EIO, errno.ESTALE, errno.EINVAL):

        def refused(*_: object, code: int = code, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched, pytest.raises(InputError) as caught:
            patched.setattr(builtins, "open", refused)
            read_image(file)
        # Pillow goes to a place in the file that a damaged file names, and the system refuses that as EINVAL.
        damaged = code == errno.EINVAL
        assert isinstance(caught.value, NoAccess) is not damaged and ("restore it" in str(caught.value)) is damaged
        assert damaged or str(caught.value) == f"cannot read image {str(file)!r}: {os.strerror(code)}"


def test_a_file_of_a_disk_that_is_gone_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    file = saved(tmp_path, Image.fromarray(COLOURS))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", gone)
        with pytest.raises(NoAccess, match=os.strerror(errno.ESTALE)):
            read_image(file)
    with pytest.raises(NoAccess, match="there is no such file, nor its folder"):
        read_image(tmp_path / "unmounted" / file.name)
    with pytest.raises(InputError, match=r"there is no such file$") as caught:
        read_image(tmp_path / "other.png")  # of which a folder may lose one at any time
    assert not isinstance(caught.value, NoAccess)


@pytest.mark.parametrize("suffix", ["gif", "avif"])
def test_the_first_picture_of_an_animation_is_an_image_by_its_name_and_as_bytes(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and not ("avif" in features.modules and features.check("avif")):
        pytest.skip("this Pillow reads no AVIF")
    red, blue = (Image.new("RGB", (16, 32), colour) for colour in ("red", "blue"))
    path = saved(tmp_path, red, f"X.{suffix.upper()}", save_all=True, append_images=[blue])
    assert is_image(path.name)
    for image in (path, path.read_bytes()):
        shown = np.asarray(read_image(image)).astype(int)
        assert shown.shape == (32, 16, 3) and np.abs(shown - [255, 0, 0]).max() < 10


def test_avif_is_no_image_where_pillow_does_not_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(features.modules, "avif", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runpy.run_path(pixels.__file__)["is_image"]("x.avif")


def test_photos_of_iphones_are_images_where_their_reader_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[int] = []
    reader = SimpleNamespace(register_heif_opener=lambda: registered.append(1))
    for installed in (reader, None):
        # None makes the import fail, as Python's documentation of sys.modules says.
        monkeypatch.setitem(sys.modules, "pillow_heif", installed)
        is_image = runpy.run_path(pixels.__file__)["is_image"]
        assert is_image("IMG_1.HEIC") is bool(installed) and is_image("IMG_1.JPG")
    assert registered == [1]


def test_a_photo_of_an_iphone_is_read_upright(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    turned = Image.new("RGB", (64, 32), "red")
    turned.paste("blue", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise: the left side becomes the top
    turned.save(tmp_path / "IMG_1.HEIC", exif=exif.tobytes())
    upright = np.asarray(read_image(tmp_path / "IMG_1.HEIC")).astype(int)
    assert upright.shape == (64, 32, 3)
    assert upright[16, 16] == pytest.approx([0, 0, 255], abs=20) and upright[48, 16] == pytest.approx(
        [255, 0, 0], abs=20
    )


def test_a_photo_of_an_iphone_says_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mom's.HEIC").write_bytes(b"ftypheic")
    for readers, cure in (((), "pip install pillow-heif to read it"), ((".heic", ".heif"), "restore it or remove it")):
        monkeypatch.setattr(pixels, "HEIF", readers)
        with pytest.raises(InputError, match=f"it is not an image; {cure}"):
            read_image(tmp_path / "mom's.HEIC")
