"""Covers of an import: which items have one, what is linked or copied, and what is said if none fits."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import lmdb
import pytest

from iisan_fast.data.images.dataset_images import open_images
from iisan_fast.data.imports.writing.covers import write_covers
from iisan_fast.errors import InputError


class LmdbImage:
    """An image of MicroLens' database: floats alone."""

    def __init__(self) -> None:
        self.image = bytes(4)


LmdbImage.__module__ = "__main__"
LmdbImage.__qualname__ = "LMDB_Image"


@pytest.fixture
def covers(tmp_path: Path) -> Path:
    """Return a folder with the covers of a and b in subfolders, and of z."""
    for name in ("010/a.jpg", "011/b.JPEG", "z.gif"):
        (tmp_path / "covers" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "covers" / name).write_text(name)
    return tmp_path / "covers"


@pytest.mark.parametrize("copy", [False, True])
def test_covers_in_subfolders_are_linked_or_copied_into_one_folder(covers, copy, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "dataset"
    folder.mkdir()
    assert write_covers(folder, covers, ["a", "b", "c"], copy) == 1
    assert f"{covers}: 2 covers for 3 items, in this folder and its subfolders" in caplog.messages
    assert "no cover for 1 of 3 items (c): extract with missing_images: blank fills them" in caplog.messages
    assert (folder / "images").is_symlink() != copy
    if copy:
        assert sorted(path.name for path in (folder / "images").iterdir()) == ["a.jpg", "b.JPEG"]
    with open_images(folder) as images:
        assert [images.content(item) for item in "abc"] == [b"010/a.jpg", b"011/b.JPEG", None]


def test_covers_of_which_none_fits_show_names_and_ids(covers, tmp_path):
    with pytest.raises(InputError) as error:
        write_covers(tmp_path, covers, ["1", "2", "3", "4"], False)
    assert "no image is named by an item: expected 1, 2, 3 and 1 more, found z.gif, 010/a.jpg, 011/b.JPEG" in str(
        error.value
    )
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("subdir", [False, True])
def test_a_database_of_covers_is_linked_or_copied(tmp_path, monkeypatch, copy, subdir):
    monkeypatch.setattr("__main__.LMDB_Image", LmdbImage, raising=False)
    entries = {b"1": LmdbImage(), b"__keys__": [b"0"], b"__len__": 1}
    with lmdb.open(str(tmp_path / "covers"), subdir=subdir) as env, env.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, pickle.dumps(value))
    folder = tmp_path / "dataset"
    folder.mkdir()
    assert write_covers(folder, tmp_path / "covers", ["1", "2"], copy) == 1
    assert (folder / "images.lmdb").is_symlink() != copy
    with open_images(folder) as images:
        assert images.content("1") is not None and images.content("2") is None
    with pytest.raises(InputError, match="no image is named by an item: expected 7; rename the items"):
        write_covers(folder, tmp_path / "covers", ["7"], copy)
