"""Read the pictures that an item is captioned from: its image, or frames of its video.

Nothing here needs a model, so worker processes can check all pictures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..data import ImageError, ImageFolder, ImageLmdb, is_image_name, read_image_file
from ..errors import InputError


class Pictures(Protocol):
    """The pictures of items, by item id. It can be sent to another process."""

    at_most: int  # the most pictures of one item

    def read(self, item_id: str) -> list[Image.Image]:
        """Return an item's pictures, one or more, in RGB. Raises ImageError if it has none or one is damaged."""


class Covers:
    """The images of a dataset's items, one for each item."""

    at_most = 1

    def __init__(self, images: ImageFolder | ImageLmdb) -> None:
        """Take the images that `data.open_images` has opened."""
        self.images = images

    def read(self, item_id: str) -> list[Image.Image]:
        """Return the item's image in a list of one. Raises ImageError if it is missing or damaged."""
        content = self.images.content(item_id)
        if content is None:
            raise ImageError("no image")
        return [self.images.decode(content)]


class Frames:
    """At most `at_most` frames of each item's video, from a folder that has a folder of images for each item."""

    def __init__(self, path: Path, at_most: int) -> None:
        """Take the folder of the items' folders. Raises InputError if it does not exist."""
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; expected one with the frames of each item, <item_id>/*.jpg")
        self.path = path
        self.at_most = at_most
        with os.scandir(path) as entries:
            self._items = {entry.name for entry in entries if entry.is_dir()}

    def read(self, item_id: str) -> list[Image.Image]:
        """Return evenly spread frames of the item's video. Raises ImageError if it has none or one is damaged."""
        if item_id not in self._items:
            raise ImageError("no folder of frames")
        with os.scandir(self.path / item_id) as entries:
            names = [entry.name for entry in entries if is_image_name(entry.name)]
        if not names:
            raise ImageError("no frames in its folder")
        return [self._decode(item_id, name) for name in spread(sorted(names, key=natural), self.at_most)]

    def _decode(self, item_id: str, name: str) -> Image.Image:
        """Return a frame in RGB. Raises ImageError if it is damaged, InputError if it is no file, both naming it."""
        file = self.path / item_id / name
        try:
            return ImageFolder.decode(read_image_file(file))
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None


def problems(pictures: Pictures, item_ids: Sequence[str]) -> list[str]:
    """Return, for each item, why its pictures cannot be read; "" if they can."""
    return [_problem(pictures, item_id) for item_id in item_ids]


def natural(name: str) -> tuple[list[int | str], str]:
    """Return a sort key for file names that puts frame2 before frame10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def spread(names: Sequence[str], count: int) -> list[str]:
    """Return `count` evenly spread names: the middle one of each of `count` equal parts; all if there are no more."""
    count = min(count, len(names))
    return [names[(2 * part + 1) * len(names) // (2 * count)] for part in range(count)]


def _problem(pictures: Pictures, item_id: str) -> str:
    """Return why an item's pictures cannot be read; "" if they can."""
    try:
        pictures.read(item_id)
    except ImageError as error:
        return str(error)
    return ""
