"""Databases of images: what is read, and the one clear line that every kind of bad input gets."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from PIL import Image

from iisan_fast.data.images import image_database
from iisan_fast.data.images.dataset_images import open_images
from iisan_fast.data.images.image_database import ImageLmdb
from iisan_fast.data.images.image_decoding import ImageError
from iisan_fast.data.images.image_folder import ImageFolder
from iisan_fast.errors import InputError


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


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


def test_a_giant_entry_is_refused_before_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lmdb(tmp_path / "x.lmdb", {"a": LmdbImage.of("a", Image.new("RGB", (99, 99)))})
    with ImageLmdb(path) as images:
        monkeypatch.setattr(image_database, "MAX_FILE_BYTES", 9999)
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


def floats_of(pixels: np.ndarray) -> bytes:
    """Return the bytes that MicroLens keeps of an image of 224 x 224."""
    return ((pixels.transpose(2, 0, 1) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)).tobytes()


def test_floats_of_microlens_give_their_pixels_back(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    # Its writer names the images from 0 on, whatever the items' ids are.
    path = write_lmdb(tmp_path / "x.lmdb", {"7": LmdbImage(image=floats_of(pixels))}, __keys__=[b"0"], __len__=1)
    with ImageLmdb(path) as images:
        assert np.array_equal(images.decode(images.content("7")), pixels)
        assert images.content("0") is None
        assert images.holds("7") and not images.holds("0") and not images.holds("7" * 600)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (bytes(4 * 3 * 224 * 224), "floats that are not .pixel / 255 - 0.5. / 0.5; give MicroLens' folder of covers"),
        (b"\xff" * (4 * 3 * 224 * 224), "floats that are not .pixel / 255 - 0.5. / 0.5; give MicroLens' folder"),
        (bytes(4 * 224), "floats in 896 bytes; .* give MicroLens' folder of covers in place of the database"),
    ],
)
def test_other_floats_name_the_folder_of_covers(values: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        ImageLmdb.decode(pickle.dumps(LmdbImage(image=values)))
