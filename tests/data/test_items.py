"""Tables and images: what is read, and the one clear line that every kind of bad input gets."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from iisan_fast.data import items
from iisan_fast.data.items import MAX_PIXELS, ImageError, ImageFolder, ImageLmdb, open_images, read_items
from iisan_fast.errors import InputError


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# Titles and captions


def test_items_keep_file_order_and_unescape_entities(tmp_path: Path) -> None:
    (tmp_path / "items.tsv").write_text("b\tNuts &amp; Bolts\na\tPlain\n")
    assert read_items(tmp_path).ids == ["b", "a"]
    assert read_items(tmp_path).titles == ["Nuts & Bolts", "Plain"]
    assert read_items(tmp_path, unescape=False).titles[0] == "Nuts &amp; Bolts"
    assert read_items(tmp_path).captions is None


def test_captions_may_be_fewer_than_items(tmp_path: Path) -> None:
    (tmp_path / "items.tsv").write_text("a\tA\nb\tB\n")
    (tmp_path / "captions.tsv").write_text("b\tIt&#39;s blue\n")
    assert read_items(tmp_path).captions == {"b": "It's blue"}


@pytest.mark.parametrize(
    ("items", "captions", "message"),
    [
        ("a\tA\nb\tB\na\tC\n", "a\tx\n", "items.tsv line 3: item 'a' stands on line 1 already"),
        ("a\tA\nb\tB\n", "a\tx\na\ty\n", "captions.tsv line 2: item 'a' stands on line 1 already"),
        ("a\tA\nb\tB\n", "a\tx\nc\ty\n", "captions.tsv line 2: item 'c' is not in items.tsv"),
        ("a b\tA\n", "a b\tx\n", "items.tsv line 1: item id 'a b' has a space or NUL"),
    ],
)
def test_bad_items_and_captions(tmp_path: Path, items: str, captions: str, message: str) -> None:
    (tmp_path / "items.tsv").write_text(items)
    (tmp_path / "captions.tsv").write_text(captions)
    with pytest.raises(InputError) as error:
        read_items(tmp_path)
    assert message in one_line(error)


# Where the images are


def test_images_are_found_in_a_folder_or_a_database(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found neither"):
        open_images(tmp_path)
    write_lmdb(tmp_path / "pictures.lmdb", {"a": LmdbImage.of("a")})
    with open_images(tmp_path) as images:
        assert isinstance(images, ImageLmdb)
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="images, pictures.lmdb"):
        open_images(tmp_path)
    (tmp_path / "pictures.lmdb").unlink()
    with open_images(tmp_path) as images:
        assert isinstance(images, ImageFolder)


def test_several_databases_are_refused(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.lmdb").touch()
    with pytest.raises(InputError, match="found a.lmdb, b.lmdb, c.lmdb and 1 more"):
        open_images(tmp_path)


# The folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


decode = ImageFolder.decode


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.png", "PNG"), ("a.webp", "WEBP"), ("a.JPG", "JPEG"), ("a.jpg", "GIF")],
)
def test_every_kind_of_file_is_read(folder: Path, name: str, format: str) -> None:
    content = encoded(Image.new("RGB", (7, 5), (250, 20, 20)), format)
    (folder / name).write_bytes(content)
    with ImageFolder(folder) as images:
        assert images.content("a") == content
        decoded = images.decode(content)
    assert (decoded.mode, decoded.size) == ("RGB", (7, 5))
    assert np.abs(np.asarray(decoded).astype(int) - (250, 20, 20)).max() < 12


def test_items_without_an_image_and_files_that_are_none(folder: Path) -> None:
    (folder / "a.txt").write_text("no image")
    (folder / "b.png").mkdir()
    images = ImageFolder(folder)
    assert images.content("a") is images.content("b") is images.content("c") is None


def test_two_files_of_one_item_are_named(folder: Path) -> None:
    for name in ("a.png", "a.jpg"):
        (folder / name).touch()
    with pytest.raises(InputError, match="'a': a.jpg and a.png"):
        ImageFolder(folder)


@pytest.mark.parametrize("item_id", ["../secret", "x/../../secret", "..", ".", "/secret", "..\\secret", "secret\0"])
def test_an_item_id_does_not_leave_the_folder(folder: Path, item_id: str) -> None:
    (folder.parent / "secret.png").write_bytes(b"secret")
    with pytest.raises(InputError, match="cannot be a file's name"):
        ImageFolder(folder).content(item_id)


def test_dots_within_an_item_id_are_ordinary(folder: Path) -> None:
    (folder / "v1..2.png").write_bytes(b"content")
    assert ImageFolder(folder).content("v1..2") == b"content"


def test_an_image_that_vanished_is_an_error(folder: Path) -> None:
    (folder / "a.png").touch()
    images = ImageFolder(folder)
    (folder / "a.png").unlink()
    with pytest.raises(InputError, match="a.png: cannot be read"):
        images.content("a")


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


# The database


class LmdbImage:
    """The object that the released project pickles, under its name there."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    @classmethod
    def of(cls, item_id: str, picture: Image.Image | None = None, **changes: Any) -> LmdbImage:
        pixels = np.asarray(picture or Image.new("RGB", (3, 2), (10, 20, 30)))
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        height, width, channels = pixels.shape
        attributes = {"channels": channels, "size": (height, width), "image": pixels.tobytes(), "id": item_id}
        return cls(**attributes | changes)


LmdbImage.__module__ = "__main__"
LmdbImage.__qualname__ = "LMDB_Image"


@pytest.fixture(autouse=True)
def released_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickle refers to a class by name, so the name must be there while the tests write."""
    monkeypatch.setattr(sys.modules["__main__"], "LMDB_Image", LmdbImage, raising=False)


def write_lmdb(path: Path, images: dict[str, Any], subdir: bool = False, **specials: Any) -> Path:
    keys = {"__keys__": [key.encode() for key in images], "__len__": len(images)} | specials
    with lmdb.open(str(path), subdir=subdir, map_size=1 << 24) as env, env.begin(write=True) as transaction:
        for key, value in {**images, **keys}.items():
            if value is not None:
                transaction.put(key.encode(), value if isinstance(value, bytes) else pickle.dumps(value))
    path.with_name(path.name + "-lock").unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("subdir", [False, True])
def test_database_gives_its_images(tmp_path: Path, subdir: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    path = write_lmdb(tmp_path / "x.lmdb", {"a": LmdbImage.of("a", Image.fromarray(noise))}, subdir)
    before = sorted(tmp_path.rglob("*"))
    with ImageLmdb(path) as images:
        content = images.content("a")
        assert np.array_equal(images.decode(content), noise)
        assert images.content("b") is None
        assert images.content("b" * 600) is None
    assert sorted(tmp_path.rglob("*")) == before


def test_grey_and_transparent_images_of_a_database(tmp_path: Path) -> None:
    grey, clear = Image.new("L", (2, 2), 7), Image.new("RGBA", (2, 2), (9, 9, 9, 0))
    path = write_lmdb(tmp_path / "x.lmdb", {"g": LmdbImage.of("g", grey), "c": LmdbImage.of("c", clear)})
    with ImageLmdb(path) as images:
        assert images.decode(images.content("g")).getpixel((0, 0)) == (7, 7, 7)
        assert images.decode(images.content("c")).getpixel((0, 0)) == (255, 255, 255)


def test_database_of_a_script_is_read(tmp_path: Path) -> None:
    """Written as the released project does it: a script's own class, default protocol."""
    script = """
import lmdb, pickle, sys
class LMDB_Image:
    def __init__(self, channels, size, image, id):
        self.channels, self.size, self.image, self.id = channels, size, image, id
env = lmdb.open(sys.argv[1], subdir=False, map_size=1 << 20)
with env.begin(write=True) as transaction:
    transaction.put(b"B0", pickle.dumps(LMDB_Image(3, (1, 1), b"abc", "B0")))
    transaction.put(b"__keys__", pickle.dumps([b"B0"]))
    transaction.put(b"__len__", pickle.dumps(1))
"""
    path = tmp_path / "x.lmdb"
    subprocess.run([sys.executable, "-c", script, path], check=True)
    with ImageLmdb(path) as images:
        assert images.decode(images.content("B0")).getpixel((0, 0)) == tuple(b"abc")


def test_database_survives_being_sent_to_another_process(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "x.lmdb", {"a": LmdbImage.of("a")})
    with ImageLmdb(path) as images:
        content = images.content("a")
        sent = pickle.dumps(images)
    with pickle.loads(sent) as received:
        assert received.content("a") == content


def test_a_database_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "x.lmdb", {"a": LmdbImage.of("a")})
    with ImageLmdb(path) as images:
        assert images.content("a")
        script = """
import lmdb, sys
with lmdb.open(sys.argv[1], subdir=False) as env, env.begin(write=True) as transaction:
    transaction.put(b"b", b"b")
"""
        subprocess.run([sys.executable, "-c", script, path], check=True)
        with pytest.raises(InputError, match="has changed while it was read; start again"):
            images.content("a")


def test_a_giant_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="a.png: giant file: over 536870912 bytes; make the image smaller"):
        ImageFolder(tmp_path).content("a")


def test_a_giant_entry_is_refused_before_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lmdb(tmp_path / "x.lmdb", {"a": LmdbImage.of("a", Image.new("RGB", (99, 99)))})
    with ImageLmdb(path) as images:
        monkeypatch.setattr(items, "MAX_FILE_BYTES", 9999)
        with pytest.raises(InputError, match="entry 'a': giant, of 29[0-9]{3} bytes; at most 9999"):
            images.content("a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (2, 4)}, "2 x 4 pixels of 3 channels in 18 bytes"),
        ({"size": (-2, -3)}, "-2 x -3 pixels"),
        ({"size": (0, 3), "image": b""}, "0 x 3 pixels"),
        ({"channels": 2, "size": (3, 3)}, "of 2 channels"),
        ({"size": (10**6, 10**6)}, "damaged image"),
    ],
)
def test_sizes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    content = pickle.dumps(LmdbImage.of("a", **changes))
    with pytest.raises(ImageError, match=message):
        ImageLmdb.decode(content)


def test_a_giant_image_of_a_database() -> None:
    content = pickle.dumps(LmdbImage(channels=1, size=(8001, 8000), image=bytes(8001 * 8000), id="a"))
    with pytest.raises(ImageError, match="^giant image: 8000 x 8001 is over 64 megapixels"):
        ImageLmdb.decode(content)


class Touch:
    """Pickles into a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("key", ["a", "__keys__", "__len__"])
def test_hostile_pickles_are_refused_by_key_and_not_executed(tmp_path: Path, key: str) -> None:
    executed = tmp_path / "executed"
    path = write_lmdb(tmp_path / "x.lmdb", {"a": LmdbImage.of("a")}, **{key: Touch(executed)})
    with pytest.raises(InputError) as error:
        ImageLmdb(path).content("a")
    assert f"{path}: entry {key!r}: refused pickle" in one_line(error)
    assert not isinstance(error.value, ImageError)
    assert not executed.exists()
    pickle.loads(pickle.dumps(Touch(executed))).close()
    assert executed.exists()


@pytest.mark.parametrize("value", [b"plain", 7, [1], LmdbImage, LmdbImage.of("a", id=7), b"\x80\x04."])
def test_entries_that_are_no_image_are_refused_by_key(tmp_path: Path, value: Any) -> None:
    path = write_lmdb(tmp_path / "x.lmdb", {"a": pickle.dumps(value) if value != b"\x80\x04." else value})
    with ImageLmdb(path) as images, pytest.raises(InputError, match="entry 'a': refused pickle"):
        images.content("a")


@pytest.mark.parametrize(
    ("specials", "message"),
    [
        ({"__keys__": None}, "no entry '__keys__'"),
        ({"__len__": None}, "no entry '__len__'"),
        ({"__len__": 3}, "'__len__' says 3 images, but '__keys__' lists 2, 2 stand there"),
        ({"__keys__": [b"a"], "__len__": 1}, "'__len__' says 1 images, but '__keys__' lists 1, 2 stand there"),
        ({"__keys__": ["a", "b"]}, "expected a pickled list of bytes"),
        ({"__len__": "2"}, "expected a pickled int, found str"),
        ({"__keys__": [b"a", b"b", b"a"], "__len__": 3}, "entry '__keys__' lists 'a' twice"),
    ],
)
def test_lists_that_do_not_fit_the_database(tmp_path: Path, specials: dict[str, Any], message: str) -> None:
    path = write_lmdb(tmp_path / "x.lmdb", {"a": LmdbImage.of("a"), "b": LmdbImage.of("b")}, **specials)
    with pytest.raises(InputError) as error:
        ImageLmdb(path)
    assert message in one_line(error)
    write_lmdb(tmp_path / "y.lmdb", {"a": LmdbImage.of("a")})
    with ImageLmdb(tmp_path / "y.lmdb") as images:
        assert images.content("a")


def test_an_image_of_another_item_is_refused(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "x.lmdb", {"a": LmdbImage.of("b"), "b": LmdbImage.of("b")})
    with ImageLmdb(path) as images:
        with pytest.raises(InputError, match="entry 'a' holds the image of item 'b'; write the database again"):
            images.content("a")
        assert images.content("b")


def test_an_image_may_bear_a_name_of_its_own(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "x.lmdb", {"a": LmdbImage.of("a.jpg"), "b": LmdbImage.of("b.jpg")})
    with ImageLmdb(path) as images:
        assert images.content("a") and images.content("b")


def test_images_that_the_writer_could_not_read_are_missing_only(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "x.lmdb", {"a": LmdbImage.of("a")}, __keys__=[b"a", b"bad"], __len__=2)
    with ImageLmdb(path) as images:
        assert images.content("bad") is None


@pytest.mark.parametrize("content", [b"", b"no database", bytes(9000)])
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.lmdb").write_bytes(content)
    with pytest.raises(InputError, match="x.lmdb: not an LMDB"):
        ImageLmdb(tmp_path / "x.lmdb")


def test_an_empty_folder_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "x.lmdb").mkdir()
    with pytest.raises(InputError, match="x.lmdb: not an LMDB"):
        ImageLmdb(tmp_path / "x.lmdb")


@pytest.mark.parametrize("subdir", [False, True])
def test_a_truncated_database_is_refused_before_it_is_read(tmp_path: Path, subdir: bool) -> None:
    big = Image.new("RGB", (200, 200))
    path = write_lmdb(tmp_path / "x.lmdb", {name: LmdbImage.of(name, big) for name in "abc"}, subdir)
    file = path / "data.mdb" if subdir else path
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match="truncated LMDB: expected"):
        ImageLmdb(path)
