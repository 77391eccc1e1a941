"""List the images of a folder and its subfolders once, in an index that takes 50 bytes for most images.

The index can be sent to other processes, so that none of them lists the folder again.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...checksums import name_seed
from ...errors import InputError
from .image_formats import image_suffixes

# Folders that hold no images of items: previews that macOS and storage devices add. Hidden folders neither.
LEFT_OUT = frozenset(("__MACOSX", "@eaDir"))


class ImageListing:
    """The images of N items in a folder and its subfolders: paths relative to the folder by item id.

    Paths stand one after the other in one string of bytes, and are found by a checksum of the item id.
    """

    def __init__(self, path: Path) -> None:
        """List the folder. Raises InputError if two files belong to one item.

        A file is an image by its suffix. Hidden files and folders are left out; a folder behind several links is read
        once. A FIFO, a device or a link that leads nowhere is listed too, so that its reader can name it.
        """
        self._content, ends, keys = _listed(path)
        self._order = np.argsort(keys, kind="stable").astype(np.uint32)
        self._keys = keys[self._order]  # uint64 [N], ascending
        self._ends = ends  # int64 [N + 1], of each path in the content, from 0 on
        self._refuse_repeated(path)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._keys)

    def path_of(self, item_id: str) -> str | None:
        """Return the path of an item's image, relative to the folder; None if it has none."""
        name = os.fsencode(item_id)
        key = name_seed(name)
        place = int(self._keys.searchsorted(np.uint64(key)))
        while place < len(self) and int(self._keys[place]) == key:
            path = self._path(int(self._order[place]))
            if _item_id(path) == name:
                return os.fsdecode(path)
            place += 1
        return None

    def paths(self) -> Iterator[str]:
        """Yield the paths in the order in which they were listed."""
        return (os.fsdecode(self._path(number)) for number in range(len(self)))

    def _path(self, number: int) -> bytes:
        """Return the path of an image by its number in the order of the listing."""
        return self._content[self._ends[number] : self._ends[number + 1]]

    def _refuse_repeated(self, path: Path) -> None:
        """Raise InputError if two files belong to one item."""
        equal_to_next = self._keys[1:] == self._keys[:-1]
        repeated = np.zeros(len(self), dtype=bool)
        repeated[1:] |= equal_to_next
        repeated[:-1] |= equal_to_next
        paths: dict[bytes, bytes] = {}  # by item id, of those whose checksum is that of another
        for number in self._order[repeated].tolist():
            file = self._path(number)
            other = paths.setdefault(_item_id(file), file)
            if other is not file:
                names = " and ".join(map(os.fsdecode, sorted((other, file))))
                raise InputError(f"{path}: two images of item {os.fsdecode(_item_id(file))!r}: {names}; keep one")


def is_image_name(name: str) -> bool:
    """Return True if a file's name has the suffix of an image and is not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()


def _listed(path: Path) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Return the paths of all images, one after the other, their ends from 0 on, and their items' checksums."""
    content = bytearray()
    ends = array("q", [0])
    keys = array("Q")
    suffixes = image_suffixes()
    for prefix, name in _walk(path):
        item_id, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes:
            content += os.fsencode(prefix + name)
            ends.append(len(content))
            keys.append(name_seed(os.fsencode(item_id)))
    return bytes(content), np.array(ends, dtype=np.int64), np.array(keys, dtype=np.uint64)


def _item_id(path: bytes) -> bytes:
    """Return the item id of an image's path: the file's name without its suffix."""
    return os.path.splitext(os.path.basename(path))[0]


def _walk(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the subfolder, "" or with a slash at its end, and the name of each file of a folder that is not hidden.

    Subfolders come in the order of their names, real ones before links to folders.
    """
    folders = [""]
    links: list[str] = []
    visited: set[tuple[int, int]] = set()
    while folders or links:
        prefix = folders.pop() if folders else links.pop()
        status = os.stat(path / prefix)
        if (place := (status.st_dev, status.st_ino)) in visited:
            continue
        visited.add(place)
        subfolders: list[str] = []
        with os.scandir(path / prefix) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in LEFT_OUT:
                    continue
                if not entry.is_dir():
                    yield prefix, entry.name
                else:
                    (links if entry.is_symlink() else subfolders).append(f"{prefix}{entry.name}/")
        folders += sorted(subfolders, reverse=True)
