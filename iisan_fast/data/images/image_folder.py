"""Read the images of a folder and its subfolders, <item_id>.jpg and the like. The folder is listed once."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from PIL import Image

from ...errors import InputError
from ...files import refuse_irregular
from .image_decoding import MAX_FILE_BYTES, decode_image
from .image_listing import ImageListing

# A FIFO must not block and a terminal must not take over; Windows needs to hear that a file is no text.
OPENING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


def refuse_unfit_name(folder: Path, item_id: str) -> None:
    """Raise InputError if an item id cannot be the name of a file in the folder."""
    if item_id in (".", "..") or any(character in item_id for character in "/\\\0"):
        raise InputError(f"{folder}: item id {item_id!r} cannot be a file's name; rename the item")


class ImageFolder:
    """A folder of images <item_id>.jpg and the like, which is listed once. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        """List the folder. Raises InputError if two files belong to one item."""
        self.path = path
        self._images = ImageListing(path)

    def __enter__(self) -> ImageFolder:
        """Return the folder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: no file stays open between reads."""

    def content(self, item_id: str) -> bytes | None:
        """Return the bytes of an item's file, None if it has none. Raises InputError if the file cannot be read."""
        refuse_unfit_name(self.path, item_id)
        file = self._images.path_of(item_id)
        return None if file is None else read_image_file(self.path / file)

    @staticmethod
    def decode(content: bytes) -> Image.Image:
        """Decode the bytes of a file: RGB, upright, on white. Raises ImageError if the image is damaged or giant."""
        return decode_image(content)


def read_image_file(file: Path) -> bytes:
    """Return the bytes of a file. Raises InputError if it cannot be read, is no regular file, or is giant."""
    try:
        descriptor = os.open(file, OPENING)
    except OSError as error:
        refuse_irregular(file)
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    with open(descriptor, "rb", buffering=0) as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            refuse_irregular(file)
        if status.st_size > MAX_FILE_BYTES:
            raise InputError(f"{file}: giant file: over {MAX_FILE_BYTES} bytes; make the image smaller")
        try:
            return opened.read()
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from None
