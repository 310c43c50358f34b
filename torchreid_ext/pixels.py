"""Reads the pixels of an image, in the same way for training, test, search and extraction."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import stat
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from pml_drsl.checks import InputError

Array: TypeAlias = np.ndarray[Any, Any]

_ORIENTATION = 0x112  # the EXIF tag that says how the camera was held
_UPRIGHT: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip

HEIF: tuple[str, ...] = ()
with contextlib.suppress(ImportError):  # Pillow reads photos of iPhones with this optional package.
    importlib.import_module("pillow_heif").register_heif_opener()
    HEIF = (".heic", ".heif")
# Pillow before 11.3 does not know the word, and would warn.
AVIF = (".avif",) if "avif" in features.modules and features.check("avif") else ()

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", *AVIF, *HEIF,
)  # fmt: skip
"""How the names of images end, in lower case."""

# Phones take photos of 108 and 200 megapixels. Pillow warns of them without a name, and refuses twice the size.
# A filter of the program that imports this comes before it.
warnings.simplefilter("ignore", Image.DecompressionBombWarning, append=True)


class NoAccess(InputError):
    """A file cannot be opened, or its disk fails or is gone, which says nothing of the image in it."""


def is_image(name: str) -> bool:
    """Whether a file has the name of an image."""
    return name.lower().endswith(SUFFIXES)


def needs_heif(name: str) -> bool:
    """Whether a file has the name of a photo of an iPhone, and the package that reads it is not installed."""
    return not HEIF and name.lower().endswith((".heic", ".heif"))


def read_image(
    image: str | os.PathLike[str] | bytes | Image.Image | Array, megapixels: float | None = None
) -> Image.Image:
    """An RGB image, decoded completely, with the pixels that torchreid reads, but for three kinds of images.

    A photo is turned upright, as its EXIF orientation says. 16-bit grey becomes 8-bit grey by a division by 257.
    Transparent pixels are laid on white, because the colours below them are arbitrary. Of several pictures in one file,
    the first is read.

    Args:
        image: a path, the bytes of a file, a Pillow image, or a uint8 or uint16 array of shape [H, W] or [H, W, 3] in
            RGB order. Bytes are read in the formats of ``SUFFIXES`` alone, none of which runs another program.
        megapixels: refuse a file with more pixels, before they are decoded.

    An InputError names a file that is missing, empty, damaged, too large or not an image, and refuses arrays of another
    shape or type, and pixels without a defined range (floats, 32-bit integers). For a file that cannot be opened, it is
    NoAccess."""
    if isinstance(image, np.ndarray):
        return _from_array(image)
    formats, path, name, empty = None, "", "that was given", False
    if isinstance(image, bytes):
        empty = not image
        formats = [kind for suffix, kind in Image.registered_extensions().items() if suffix in SUFFIXES]
    elif not isinstance(image, Image.Image):
        path = os.fspath(image)
        name, empty = repr(path), _size(path) == 0
    if empty:
        raise InputError(f"cannot read image {name}: the file is empty; restore it or remove it")
    try:
        if isinstance(image, Image.Image):  # Pillow may not have decoded it yet.
            return _upright_rgb(image, name)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=formats) as opened:
            if megapixels and opened.width * opened.height > megapixels * 1e6:
                large = f"it has more than {megapixels:g} megapixels"
                raise InputError(f"cannot read image {name}: {large}; make it smaller")
            return _upright_rgb(opened, name)
    except InputError:
        raise
    except Exception as error:  # Pillow checks little of what a file says, so a damaged file may raise any exception.
        # A damaged file may also name a place in itself that is none (EINVAL).
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise NoAccess(f"cannot read image {name}: {error.strerror}") from error
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else f"damaged ({error})"
        cure = "pip install pillow-heif to read it" if needs_heif(path) else "restore it or remove it"
        if isinstance(error, (Image.DecompressionBombError, MemoryError)):
            most = f"it has more than {2e-6 * (Image.MAX_IMAGE_PIXELS or 0):.4g} megapixels"
            reason = f"too large ({'for the memory' if isinstance(error, MemoryError) else most})"
            cure = "make it smaller"
        raise InputError(f"cannot read image {name}: it is {reason}; {cure}") from error


def _size(path: str) -> int:
    """The size of a file in bytes."""
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = f"cannot read image {path!r}: there is no such file"
        if not os.path.isdir(os.path.dirname(path) or os.curdir):  # Its disk may be unmounted.
            raise NoAccess(f"{missing}, nor its folder") from error
        raise InputError(missing) from error
    except OSError as error:
        raise NoAccess(f"cannot read image {path!r}: {error.strerror}") from error
    if not stat.S_ISREG(about.st_mode):
        raise InputError(f"cannot read image {path!r}: it is a folder, a pipe or a device")
    return about.st_size


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """A new RGB image of a Pillow image."""
    image.load()
    # Pillow opens 16-bit PGM files in mode I, and its older versions 16-bit PNG files too.
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    with contextlib.suppress(Exception):  # A damaged orientation is none. The pixels are all there.
        # Pillow's exif_transpose also writes all EXIF tags again, and fails at odd ones. Pillow itself turns TIFF files
        # upright, and forgets their orientation.
        if (turn := _UPRIGHT.get(image.getexif().get(_ORIENTATION))) is not None:  # A flip has the number 0.
            image = image.transpose(turn)
    image = _rgb(image, is_16_bit, name)
    image.info = {}  # It still has the orientation, by which the image would be turned once more when it is read again.
    return image


def _rgb(image: Image.Image, is_16_bit: bool, name: str) -> Image.Image:
    if is_16_bit:
        return _from_16_bit(np.asarray(image), image.info.get("transparency"))
    if image.mode in ("F", "I"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        undefined = f"its pixels are {kind}, whose black and white are not defined"
        raise InputError(f"cannot read image {name}: {undefined}; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_16_bit(pixels: Array, transparent: Any = None) -> Image.Image:
    """An RGB image of 16-bit values, 257 (65,535 / 255) to each 8-bit one; those of ``transparent`` become white."""
    eight = np.round(pixels / 257).clip(0, 255).astype(np.uint8)
    if isinstance(transparent, int):
        eight[pixels == transparent] = 255
    return Image.fromarray(eight).convert("RGB")


def _from_array(array: Array) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not is_image or array.dtype not in (np.uint8, np.uint16):
        cure = "give [H, W, 3] or [H, W] of uint8 or uint16 in RGB order, or a tensor of shape [3, H, W]"
        raise InputError(f"an array of shape {list(array.shape)} and type {array.dtype} is not an image: {cure}")
    check_not_empty(array.shape)
    return _from_16_bit(array) if array.dtype == np.uint16 else Image.fromarray(array).convert("RGB")


def check_not_empty(shape: Sequence[int]) -> None:
    """Raises InputError for the shape of an image without pixels."""
    if 0 in shape:
        raise InputError(f"an image of shape {list(shape)} has no pixels")
