"""Folders of images: which files belong to which item, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from iisan_fast.data.images import image_listing
from iisan_fast.data.images.dataset_images import open_images
from iisan_fast.data.images.image_folder import ImageFolder
from iisan_fast.data.images.image_listing import ImageListing
from iisan_fast.errors import InputError


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_several_databases_are_refused(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.lmdb").touch()
    with pytest.raises(InputError, match="found a.lmdb, b.lmdb, c.lmdb and 1 more"):
        open_images(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    return path


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


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


def test_a_giant_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="a.png: giant file: over 536870912 bytes; make the image smaller"):
        ImageFolder(tmp_path).content("a")


# Subfolders


def write(path: Path, content: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def listed(path: Path) -> dict[str, str]:
    """Return the paths of a folder's images by item id, each looked up by its id."""
    listing = ImageListing(path)
    item_ids = [Path(name).stem for name in listing.paths()]
    assert len(item_ids) == len(listing)
    return {item_id: listing.path_of(item_id) for item_id in item_ids}


def test_images_of_all_subfolders_are_found_and_other_files_are_not(folder: Path) -> None:
    for name in ("010/0108775015.jpg", "covers/011/0118458003.GIF", "3.jfif", "4.tiff", "v1.2.AVIF", "5.mpo"):
        write(folder / name, name.encode())
    for name in ("__MACOSX/010/._0108775015.jpg", "__MACOSX/0108775015.jpg", ".hidden/3.jpg", "._4.png", "Thumbs.db"):
        write(folder / name)
    for name in ("readme.txt", "6.eps", "7.pdf", "8.h5", "9.mpg", "none"):
        write(folder / name)
    assert listed(folder) == {
        "0108775015": "010/0108775015.jpg",
        "0118458003": "covers/011/0118458003.GIF",
        "3": "3.jfif",
        "4": "4.tiff",
        "v1.2": "v1.2.AVIF",
        "5": "5.mpo",
    }
    with ImageFolder(folder) as images:
        assert images.content("0108775015") == b"010/0108775015.jpg"
        assert images.content("none") is None


@pytest.mark.parametrize("names", [("a/1.jpg", "b/1.png"), ("1.jpg", "thumbs/1.jpg")])
def test_two_images_of_one_item_in_subfolders_are_both_named(folder: Path, names: tuple[str, str]) -> None:
    for name in names:
        write(folder / name)
    with pytest.raises(InputError, match=f"two images of item '1': {' and '.join(names)}; keep one"):
        ImageFolder(folder)


def test_links_to_folders_are_followed_once(folder: Path) -> None:
    write(folder / "real" / "1.jpg", b"one")
    write(folder.parent / "elsewhere" / "2.jpg", b"two")
    (folder / "again").symlink_to("real", target_is_directory=True)
    (folder / "real" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "far").symlink_to(folder.parent / "elsewhere", target_is_directory=True)
    assert listed(folder) == {"1": "real/1.jpg", "2": "far/2.jpg"}


def test_a_folder_is_listed_once_and_not_again_for_its_items(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        write(folder / str(number % 3) / f"{number}.png", b"content")
    listed = []
    monkeypatch.setattr(os, "scandir", lambda path, scandir=os.scandir: (listed.append(path), scandir(path))[1])
    images = ImageFolder(folder)
    assert len(listed) == 4
    sent = pickle.loads(pickle.dumps(images))
    monkeypatch.setattr(os, "stat", lambda *arguments, **options: pytest.fail("an item's file is looked up again"))
    for number in range(9):
        assert images.content(str(number)) == sent.content(str(number)) == b"content"
    assert len(listed) == 4


def test_items_whose_checksums_are_equal_keep_their_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_listing, "name_seed", lambda name: len(name))
    for number in range(9):
        write(folder / str(number % 2) / f"{number}.png", b"%d" % number)
    images = ImageFolder(folder)
    assert [images.content(str(number)) for number in range(9)] == [b"%d" % number for number in range(9)]
    assert images.content("x") is None
    write(folder / "2" / "4.gif")
    with pytest.raises(InputError, match="two images of item '4': 0/4.png and 2/4.gif"):
        ImageFolder(folder)
