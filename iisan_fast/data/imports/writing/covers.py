"""Link or copy the covers of items into a dataset folder: images in a folder and its subfolders, or an LMDB."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ....errors import InputError, first_few
from ....files import refuse_irregular
from ....progress import progress_bar
from ...images.dataset_images import open_image_files
from ...images.image_database import ImageLmdb
from ...images.image_formats import image_suffixes
from ...images.image_listing import ImageListing
from ..families.sources import ARCHIVES

LOGGER = logging.getLogger(__name__)
DATABASE_NAME = "images.lmdb"


def write_covers(folder: Path, covers: Path, item_ids: Sequence[str], copy: bool) -> int:
    """Link the covers into a dataset folder, or copy those of the items, and return the number of items without one.

    covers: a folder of images named by item id, whose subfolders are read too, or an LMDB of images. Copies lie in one
    folder. Raises InputError if there are no covers, if none of them is named by an item, or if a cover to copy is no
    regular file.
    """
    if covers.is_file():
        _refuse_no_database(covers)
    if covers.is_file() or (covers / "data.mdb").exists():
        return _write_database(folder, covers, item_ids, copy)
    if not covers.is_dir():
        raise InputError(f"{covers}: no such folder; expected images named by item id")
    listing = ImageListing(covers)
    without = [item_id for item_id in item_ids if listing.path_of(item_id) is None]
    if not len(listing):
        raise InputError(f"{covers}: holds no image; expected images named by item id, unpacked")
    if len(without) == len(item_ids):
        names = first_few(listing.paths(), len(listing))
        ids = first_few(item_ids, len(item_ids))
        raise InputError(f"{covers}: no image is named by an item: expected {ids}, found {names}; rename the images")
    _report(covers, item_ids, without)
    images = folder / "images"
    if not copy:
        images.symlink_to(covers.resolve(), target_is_directory=True)
        return len(without)
    images.mkdir()
    with progress_bar("copying covers", len(item_ids), "covers") as advance:
        for item_id in item_ids:
            if (path := listing.path_of(item_id)) is not None:
                refuse_irregular(covers / path)
                shutil.copyfile(covers / path, images / os.path.basename(path))
            advance(1)
    return len(without)


def _refuse_no_database(covers: Path) -> None:
    """Raise InputError if a file of covers is an archive or an image."""
    if covers.name.lower().endswith(ARCHIVES):
        raise InputError(f"{covers}: is an archive; unpack it, and name the folder")
    if covers.suffix.lower() in image_suffixes():
        raise InputError(f"{covers}: is one image; expected a folder of images named by item id, or an LMDB of images")


def _write_database(folder: Path, covers: Path, item_ids: Sequence[str], copy: bool) -> int:
    """Link or copy an LMDB of covers, and return the number of items without one. Raises InputError for another one."""
    with open_image_files(covers) as images:
        assert isinstance(images, ImageLmdb)
        without = [item_id for item_id in item_ids if not images.holds(item_id)]
        if len(without) == len(item_ids):
            ids = first_few(item_ids, len(item_ids))
            raise InputError(f"{covers}: no image is named by an item: expected {ids}; rename the items")
    _report(covers, item_ids, without)
    database = folder / DATABASE_NAME
    if not copy:
        database.symlink_to(covers.resolve(), target_is_directory=covers.is_dir())
    elif covers.is_dir():
        database.mkdir()
        shutil.copyfile(covers / "data.mdb", database / "data.mdb")
    else:
        shutil.copyfile(covers, database)
    return len(without)


def _report(covers: Path, item_ids: Sequence[str], without: Sequence[str]) -> None:
    """Say how many items have a cover, and warn of those without one."""
    count = f"{len(item_ids):,}"
    LOGGER.info(
        "%s: %s covers for %s items, in this folder and its subfolders",
        covers,
        f"{len(item_ids) - len(without):,}",
        count,
    )
    if without:
        hint = "extract with missing_images: blank fills them"
        few = first_few(without, len(without))
        LOGGER.warning("no cover for %s of %s items (%s): %s", f"{len(without):,}", count, few, hint)
