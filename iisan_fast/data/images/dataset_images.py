"""Find the images of a dataset or of new items: a folder of files, or one database."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError, first_few
from .image_database import ImageLmdb
from .image_folder import ImageFolder


def open_images(root: Path) -> ImageFolder | ImageLmdb:
    """Open the images of a dataset, root/images/ or root/*.lmdb. Raises InputError if there is not exactly one."""
    folder = root / "images"
    databases = sorted(root.glob("*.lmdb"))
    sources = [folder, *databases] if folder.is_dir() else databases
    if len(sources) != 1:
        names = first_few((source.name for source in sources), len(sources)) or "neither"
        raise InputError(f"{root}: expected a folder images or exactly one *.lmdb, found {names}")
    return ImageLmdb(databases[0]) if databases else ImageFolder(folder)


def open_image_files(path: Path) -> ImageFolder | ImageLmdb:
    """Open a folder of images <item_id>.jpg and the like, or an LMDB of images.

    Raises InputError if there is neither.
    """
    if path.is_file() or (path / "data.mdb").exists():
        return ImageLmdb(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; expected images named by item id, or an LMDB of images")
    return ImageFolder(path)
