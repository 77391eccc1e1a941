"""Image files: the pixels that each gives, and the one clear line that every kind of bad image gets."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from iisan_fast.data.images import image_formats
from iisan_fast.data.images.image_decoding import MAX_PIXELS, ImageError
from iisan_fast.data.images.image_folder import ImageFolder
from iisan_fast.errors import InputError


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


decode = ImageFolder.decode


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_images_are_damaged(format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), format)
    with pytest.raises(ImageError) as error:
        decode(content[: int(share * len(content))])
    assert one_line(error)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", bytes(1000), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_says_so(content: bytes) -> None:
    with pytest.raises(ImageError, match="^not an image of JPEG, PNG"):
        decode(content)


@given(st.data())
def test_damage_anywhere_is_an_image_error_or_an_image(data: st.DataObject) -> None:
    content = bytearray(encoded(Image.new("P", (9, 9), 3), data.draw(st.sampled_from(["PNG", "GIF", "BMP", "WEBP"]))))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(content)).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and holds no pixel of it."""

    def chunk(kind: bytes, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 10_000), (60_000, 60_000)])
def test_giant_images_are_refused_by_their_header(size: tuple[int, int]) -> None:
    assert size[0] * size[1] > MAX_PIXELS
    with pytest.raises(ImageError, match="^giant image: .*over 64 megapixels"):
        decode(png_header(*size))


@pytest.mark.parametrize("size", [(1, 60_000), (30_000, 100)])
def test_thin_strips_that_resizing_would_blow_up_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="^giant image: .*longer than 200 times its width"):
        decode(png_header(*size))


def test_an_image_of_the_largest_size_is_not_giant() -> None:
    with pytest.raises(ImageError, match="^damaged image"):
        decode(png_header(8000, 8000))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_colour_modes_become_rgb(mode: str) -> None:
    image = Image.new("L", (4, 4), 255).convert(mode)
    assert np.asarray(decode(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))).min() > 250


def test_transparency_lies_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    expected = [[[255, 255, 255], [0, 0, 255]]]
    assert np.array_equal(decode(encoded(image)), expected)
    assert np.array_equal(decode(encoded(image, "WEBP", lossless=True)), expected)
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    assert np.array_equal(decode(encoded(palette, transparency=0)), expected)
    assert np.array_equal(decode(encoded(image.convert("LA"))), [[[255] * 3, [29] * 3]])


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = np.array([[0, 128 << 8, 65535]], dtype=np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(grey))))[0, :, 1].tolist() == [0, 128, 255]


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (3, 1), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise shows it upright
    decoded = decode(encoded(image, exif=exif))
    assert decoded.size == (1, 3)
    assert np.asarray(decoded)[:, 0, 0].tolist() == [255, 0, 0]


# What stands beside the pixels

PIXELS = [[9, 8, 7]] * 16


def chunk(kind: bytes, payload: bytes, checksum: int | None = None) -> bytes:
    """Return a chunk of a PNG, with a wrong checksum if one is given."""
    right = zlib.crc32(kind + payload)
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", right if checksum is None else checksum)


def png_with(*chunks: bytes, behind: bytes = b"") -> bytes:
    """Return a PNG of 16 x 8 pixels with further chunks before and behind them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 8, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes((9, 8, 7)) * 16 for _ in range(8))))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + rows + behind + chunk(b"IEND", b"")


LARGE = zlib.compress(bytes(2_000_000))


@pytest.mark.parametrize(
    "content",
    [
        png_with(chunk(b"zTXt", b"note\0\0" + LARGE)),
        png_with(chunk(b"tEXt", b"note\0" + b"a" * 2_000_000)),
        png_with(chunk(b"iTXt", b"note\0\1\0\0\0" + LARGE)),
        png_with(chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + LARGE)),
        png_with(*[chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(1_000_000)))] * 70),
        png_with(behind=chunk(b"zTXt", b"note\0\0" + LARGE)),
        png_with(chunk(b"iCCP", b"profile\0\0" + LARGE)),
        png_with(chunk(b"tEXt", b"note\0text", checksum=1)),
        png_with(chunk(b"tRNS", b"\0\1\0\1\0\1", checksum=1)),
        png_with(chunk(b"eXIf", b"II*\0", checksum=1)),
        png_with(chunk(b"zTXt", b"note\0\0no zlib"), chunk(b"pHYs", b""), chunk(b"acTL", b"")),
        png_with(chunk(b"tRNS", b"\0")),
    ],
    ids=lambda content: content[37:41].decode(),
)
def test_chunks_beside_the_pixels_of_a_png_break_nothing(content: bytes) -> None:
    assert np.array_equal(decode(content), [PIXELS] * 8)


def test_a_bomb_in_a_chunk_is_not_inflated() -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(48)) + packer.flush()
    content = png_with(*[chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb)])
    tracemalloc.start()
    decode(content)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_broken_pixels_of_a_png_stay_damaged() -> None:
    content = bytearray(png_with())
    content[content.index(b"IDAT") + 4] ^= 0xFF
    with pytest.raises(ImageError, match="^damaged image"):
        decode(bytes(content))


def segment(marker: int, body: bytes) -> bytes:
    """Return a segment of a JPEG."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize(
    "segments",
    [
        segment(0xE2, b"ICC_PROFILE\0\1\xff" + bytes(65_000)) * 200,
        segment(0xFE, b"a" * 65_000) * 20,
        segment(0xE0, b"JFIF\0"),
        segment(0xEE, b"Adobe\0"),
        segment(0xED, b"Photoshop 3.0\x008BIM\4\4\xff"),
        segment(0xE2, b"MPF\0II*\0\x08\0\0\0\x01\0" + bytes(12)),
        segment(0xE1, b"Exif\0\0garbage of a camera"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff\xfe" * 99),
        segment(0xE5, b"too short") + b"garbage \0\xff\0 behind it",
    ],
    ids=range(9),
)
def test_segments_beside_the_pixels_of_a_jpeg_break_nothing(segments: bytes) -> None:
    content = encoded(Image.new("RGB", (16, 8), (200, 10, 10)), "JPEG")
    assert np.array_equal(decode(content[:2] + segments + content[2:]), decode(content))


def test_cmyk_of_adobe_keeps_its_colours() -> None:
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert b"Adobe" in content
    assert decode(content).getpixel((3, 3)) == pytest.approx((255, 0, 0), abs=6)


# Orientation


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """Return EXIF with tags: number, type, count, and four bytes of the value or of its place."""
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)


QUARTER_TURN = (0x0112, 3, 1, b"\6\0\0\0")
BAD_TAGS = {
    "bad offset": (0x0131, 2, 900, b"\xff\xff\xff\xff"),
    "unknown type": (0x0131, 99, 1, b"abcd"),
    "text for a number": (0x011A, 2, 4, b"abc\0"),
    "a folder of tags that is not there": (0x8769, 4, 1, b"\xff\xff\xff\x7f"),
    "text for a folder of tags": (0x8825, 2, 2, b"ab\0\0"),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("tag", BAD_TAGS.values(), ids=BAD_TAGS.keys())
@pytest.mark.parametrize("first", [False, True], ids=["after it", "before it"])
def test_a_bad_tag_beside_the_orientation_does_not_matter(
    format: str, tag: tuple[int, int, int, bytes], first: bool
) -> None:
    image = Image.new("RGB", (32, 16), "black")
    image.paste((255, 255, 255), (0, 0, 16, 16))
    decoded = decode(encoded(image, format, exif=exif(*((tag, QUARTER_TURN) if first else (QUARTER_TURN, tag)))))
    assert decoded.size == (16, 32)
    assert np.asarray(decoded)[[2, 29], 8, 0].tolist() == pytest.approx([255, 0], abs=5)


@pytest.mark.parametrize(
    "tags",
    [
        exif((0x0112, 3, 1, b"\0\0\0\0")),
        exif((0x0112, 3, 1, b"\x09\0\0\0")),
        exif((0x0112, 2, 2, b"6\0\0\0")),
        exif((0x0112, 7, 1, b"\6\0\0\0")),
        exif((0x0112, 3, 0, b"\6\0\0\0")),
        b"Exif\0\0no EXIF at all",
        b"Exif\0\0II",
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_that_says_nothing_leaves_the_image(format: str, tags: bytes) -> None:
    assert decode(encoded(Image.new("RGB", (32, 16)), format, exif=tags)).size == (32, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_each_orientation_shows_the_image_upright(format: str, orientation: int) -> None:
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = [
        upright,
        upright[:, ::-1],
        upright[::-1, ::-1],
        upright[::-1],
        upright.T,
        np.rot90(upright),
        upright[::-1, ::-1].T,
        np.rot90(upright, -1),
    ][orientation - 1]
    tag = exif((0x0112, 3, 1, bytes((orientation, 0, 0, 0))))
    options = {"tiffinfo": {0x0112: orientation}} if format == "TIFF" else {"exif": tag}
    decoded = decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), format, **options))
    assert np.asarray(decoded)[..., 0].tolist() == upright.tolist()


def test_orientation_in_xmp_is_applied() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    packed = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp))
    assert decode(png_with(packed)).size == (8, 16)
    assert decode(encoded(Image.new("RGB", (32, 16)), "JPEG", xmp=xmp)).size == (16, 32)


# Formats


@pytest.mark.parametrize(
    "format",
    ["GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO", "PCX", "SGI", "QOI", "DDS", "MPO", "DIB"],
)
def test_every_raster_format_of_pillow_is_read(format: str) -> None:
    decoded = decode(encoded(Image.new("RGB", (32, 32), (200, 100, 50)), format))
    assert (decoded.mode, decoded.size) == ("RGB", (32, 32))
    assert decoded.getpixel((9, 9)) == pytest.approx((200, 100, 50), abs=6)


def test_avif_is_read_or_its_absence_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if features.check("avif"):
        content = encoded(Image.new("RGB", (32, 32), (200, 100, 50)), "AVIF")
        assert decode(content).getpixel((9, 9)) == pytest.approx((200, 100, 50), abs=6)
    else:
        content = b"\0\0\0\x20ftypavif" + bytes(99)
    monkeypatch.setitem(Image.OPEN, "AVIF", (None, lambda beginning: "no AVIF here"))
    with pytest.raises(ImageError, match="^an image of the format AVIF, which this Pillow was built without; pip inst"):
        decode(content)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_a_bad_tag_of_an_avif_does_not_matter() -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    tags[0x011A] = 72.0
    content = encoded(Image.new("RGB", (48, 16)), "AVIF", exif=tags)
    order = next(order for order in "<>" if content.count(struct.pack(f"{order}HH", 0x011A, 5)) == 1)
    bad = content.replace(
        struct.pack(f"{order}HH", 0x011A, 5), struct.pack(f"{order}HH", 0x011A, 2)
    )  # text for a ratio
    assert decode(content).size == decode(bad).size == (16, 48)


def test_heic_is_named() -> None:
    with pytest.raises(ImageError, match="^an image of the format HEIC, .*; save it as JPEG"):
        decode(b"\0\0\0\x20ftypheic" + bytes(99))


@pytest.mark.parametrize("name", ["EPS", "WMF", "GRIB", "HDF5", "MPEG", "FITS", "BUFR", "IPTC"])
def test_formats_that_run_programs_or_have_no_pixels_are_never_opened(name: str) -> None:
    assert name in Image.OPEN or not Image.init()
    assert name not in image_formats.signed_formats() + image_formats.unsigned_formats()


def test_the_first_frame_and_floats_and_lab_are_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert decode(content).getpixel((3, 3)) == pytest.approx((255, 0, 0), abs=3)
    assert decode(encoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF")).getpixel((0, 0)) == (128,) * 3
    profiles = [ImageCms.createProfile(space) for space in ("sRGB", "LAB")]
    lab = ImageCms.profileToProfile(frames[0], *profiles, outputMode="LAB")
    assert decode(encoded(lab, "TIFF")).getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=6)


@pytest.mark.parametrize("quality", [30, 90])
@pytest.mark.parametrize("size", [(64, 48), (70, 50)])
def test_a_jpeg_without_its_end_marker_is_whole_if_its_pixels_are(quality: int, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "JPEG", quality=quality)
    expected = ImageFolder.decode(content).tobytes()
    for cut in (1, 2):
        assert ImageFolder.decode(content[:-cut]).tobytes() == expected
    for cut in (6, 10, 50, len(content) // 2):
        with pytest.raises(ImageError, match="truncated"):
            ImageFolder.decode(content[:-cut])
    progressive = encoded(Image.fromarray(noise), "JPEG", quality=quality, progressive=True)
    with pytest.raises(ImageError, match="truncated"):
        ImageFolder.decode(progressive[:-2])
