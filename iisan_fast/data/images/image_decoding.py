"""Decode the bytes of an image file into upright RGB pixels. No input is trusted."""

from __future__ import annotations

import io
import warnings
from collections.abc import Hashable

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ...errors import InputError
from .image_endings import jpeg_without_end
from .image_formats import signed_formats, unread_format, unsigned_formats
from .image_metadata import ORIENTATION, orientation_of_tags, without_metadata

MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 1 << 29  # of an image file or entry: twice the bytes of MAX_PIXELS uncompressed pixels
MAX_ASPECT = 200  # an encoder that resizes by the shorter side would need too much memory for a thinner strip
TURNS = {  # by the value of the tag; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(InputError):
    """An image that cannot be used. The message is the reason; the caller adds the item id."""


def decode_image(content: bytes) -> Image.Image:
    """Decode the bytes of an image file: the first frame, in RGB, upright, on white.

    The content alone decides on the format. Raises ImageError if the image is damaged, giant or of no known format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tags that Pillow finds odd
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _open(content)
            refuse_giant(*image.size)
            turn = _turn(image) if isinstance(image, TiffImageFile) else None  # before Pillow turns it while loading
            image = _loaded(image, content)  # before other tags are read: a PNG is loaded for them, without its errors
            turn = _turn(image) if turn is None else turn
            refuse_giant(*image.size)  # an icon may hold a larger image than its header says
            return to_rgb(image if turn is None else image.transpose(turn))
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"giant image: over {MAX_PIXELS // 1_000_000} megapixels") from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = " ".join(str(error).split())
        raise ImageError(f"damaged image ({type(error).__name__}: {reason})") from None


def refuse_giant(width: int, height: int) -> None:
    """Raise ImageError if an image has more than MAX_PIXELS pixels or one side is MAX_ASPECT times the other."""
    if width * height > MAX_PIXELS:
        raise ImageError(f"giant image: {width} x {height} is over {MAX_PIXELS // 1_000_000} megapixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"giant image: {width} x {height} is longer than {MAX_ASPECT} times its width")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB, transparent parts on white."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255, not scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        image = Image.fromarray(_grey_of_floats(np.asarray(image)))
    if image.mode == "LAB":
        image = ImageCms.profileToProfile(image, *map(ImageCms.createProfile, ("LAB", "sRGB")), outputMode="RGB")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


def _open(content: bytes) -> Image.Image:
    """Open the image of a file's bytes. Raises ImageError if no format fits."""
    plain = without_metadata(content)
    try:
        return Image.open(io.BytesIO(plain), formats=signed_formats())
    except UnidentifiedImageError:
        if (unread := unread_format(content)) is not None:
            raise ImageError(f"an image of the format {unread}") from None
    try:
        return Image.open(io.BytesIO(plain), formats=unsigned_formats())
    except Exception:  # bytes of another kind make these formats' readers raise nearly anything
        raise ImageError("not an image of JPEG, PNG, WebP, GIF, BMP or another format that Pillow reads") from None


def _loaded(image: Image.Image, content: bytes) -> Image.Image:
    """Return an image with its pixels. Raises what Pillow does if they are damaged."""
    try:
        image.load()
    except OSError:
        whole = jpeg_without_end(without_metadata(content)) if isinstance(image, JpegImageFile) else None
        if whole is None:
            raise
        return whole
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the turn that shows an image upright; None if there is none, or if its tags cannot be read.

    The orientation is taken out of the tags, so that no reader turns the image by itself.
    """
    tags = image.info.get("exif")
    value = orientation_of_tags(tags) if isinstance(tags, bytes) else None
    try:
        read = image.getexif().pop(ORIENTATION, None)  # Pillow reads no tag behind a broken one
    except Exception:  # damaged tags raise nearly anything; the pixels are whole
        read = None
    value = read if value is None else value
    return TURNS.get(value) if isinstance(value, Hashable) else None


def _grey_of_floats(values: np.ndarray) -> np.ndarray:
    """Return grey values as uint8 of numbers from 0 to 1 or, if one is larger, from 0 to 255."""
    numbers = np.nan_to_num(values)
    scale = 255 if numbers.max(initial=0) <= 1 else 1
    return (numbers * scale).round().clip(0, 255).astype(np.uint8)
