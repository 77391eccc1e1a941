"""Read the images of a dataset folder from one LMDB: that of the released IISAN project, or that of MicroLens."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from PIL import Image

from ...errors import InputError
from ..databases import open_database
from .image_decoding import MAX_FILE_BYTES, ImageError, refuse_giant, to_rgb
from .image_pickles import StoredImage, unpickle

FLOATS = (3, 224, 224)  # channels, height and width of MicroLens' images
COVERS_INSTEAD = "give MicroLens' folder of covers in place of the database"


class ImageLmdb:
    """An image LMDB of IISAN or MicroLens: pickled `__main__.LMDB_Image` objects by item id.

    Its pickles are read without calling anything that they name. Use it as a context manager. It can be pickled and
    sent to another process, which opens the database again.
    """

    def __init__(self, path: Path) -> None:
        """Open a database, which is a file or a folder. Raises InputError if it is not whole or has another format."""
        self.path = path
        self._env: lmdb.Environment | None = None
        self._state = 0  # the transaction that wrote the state of the database that was opened
        try:
            self._check_length()
        except InputError:
            self.__exit__()
            raise

    def __enter__(self) -> ImageLmdb:
        """Return the database itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the database. Another read opens it again."""
        if self._env is not None:
            self._env.close()
        self._env = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to be pickled: the path alone, since an open database cannot be sent."""
        return {"path": self.path, "_env": None, "_state": 0}

    def content(self, item_id: str) -> bytes | None:
        """Return an item's pickle, None if the item has no image.

        Raises InputError if it is not an LMDB_Image, or if it is that of another item of the database.
        """
        value = self._get(item_id)
        if value is not None:
            try:
                stored = _unpickle_image(value)
            except ImageError as error:
                raise InputError(f"{self.path}: entry {item_id!r}: {error}") from None
            if stored.id not in (item_id, None) and self._get(stored.id) is not None:
                other = f"holds the image of item {stored.id[:100]!r}"
                raise InputError(f"{self.path}: entry {item_id!r} {other}; write the database again")
        return value

    @staticmethod
    def decode(content: bytes) -> Image.Image:
        """Decode a pickle: RGB, on white. Raises ImageError if the image is giant or its bytes do not fit its size."""
        stored = _unpickle_image(content)
        if stored.size is None or stored.channels is None:
            return _image_of_floats(stored.image)
        height, width = stored.size
        mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(stored.channels)
        if mode is None or min(stored.size) < 1 or height * width * stored.channels != len(stored.image):
            shape = f"{height} x {width} pixels of {stored.channels} channels"
            raise ImageError(f"damaged image: {shape} in {len(stored.image)} bytes")
        refuse_giant(width, height)
        return to_rgb(Image.frombytes(mode, (width, height), stored.image))

    def holds(self, item_id: str) -> bool:
        """Return True if there is an entry of the item. Its content is not read."""
        try:
            with self._environment().begin() as transaction, transaction.cursor() as cursor:
                return cursor.set_key(item_id.encode())
        except lmdb.BadValsizeError:
            return False

    def _check_length(self) -> None:
        """Raise InputError unless `__keys__`, `__len__` and the number of entries agree, and no key stands twice."""
        keys = self._plain("__keys__")
        length = self._plain("__len__")
        if type(keys) is not list or not all(type(key) is bytes for key in keys):
            raise InputError(f"{self.path}: entry '__keys__': expected a pickled list of bytes")
        if len(set(keys)) < len(keys):
            twice = next(key for key, count in Counter(keys).items() if count > 1).decode(errors="replace")
            raise InputError(f"{self.path}: entry '__keys__' lists {twice[:100]!r} twice; write the database again")
        if type(length) is not int:
            raise InputError(f"{self.path}: entry '__len__': expected a pickled int, found {type(length).__name__}")
        # The project's writer also lists images that it failed to read. So there may be fewer entries, but not more.
        entries = self._environment().stat()["entries"] - 2
        if length != len(keys) or entries > length:
            counts = f"'__keys__' lists {len(keys)}, {entries} stand there"
            raise InputError(f"{self.path}: '__len__' says {length} images, but {counts}; the database is not whole")

    def _plain(self, key: str) -> Any:
        """Return the unpickled value of an entry. Raises InputError if there is no such entry or it is refused."""
        value = self._get(key)
        if value is None:
            raise InputError(f"{self.path}: no entry {key!r}; expected the image LMDB of IISAN or MicroLens")
        try:
            return unpickle(value)
        except pickle.UnpicklingError as error:
            raise InputError(f"{self.path}: entry {key!r}: refused pickle ({error})") from None

    def _get(self, key: str) -> bytes | None:
        """Return the bytes of an entry, None if there is none. Raises InputError if it cannot be read."""
        try:
            with self._environment().begin(buffers=True) as transaction:
                if transaction.id() != self._state:
                    raise InputError(f"{self.path}: has changed while it was read; start again")
                value = transaction.get(key.encode())
                if value is not None and len(value) > MAX_FILE_BYTES:
                    raise InputError(
                        f"{self.path}: entry {key!r}: giant, of {len(value)} bytes; at most {MAX_FILE_BYTES}"
                    )
                return None if value is None else bytes(value)
        except lmdb.BadValsizeError:
            return None  # the key is longer than a key of an LMDB can be
        except lmdb.Error as error:
            raise InputError(f"{self.path}: entry {key!r} cannot be read ({error})") from None

    def _environment(self) -> lmdb.Environment:
        """Return the open database, which is opened at the first call."""
        if self._env is None:
            self._env = _open_lmdb(self.path)
            with self._env.begin() as transaction:
                self._state = transaction.id()
        return self._env


def _unpickle_image(value: bytes) -> StoredImage:
    """Return the LMDB_Image of a pickle. Raises ImageError if it holds anything else."""
    try:
        stored = unpickle(value)
    except pickle.UnpicklingError as error:
        raise ImageError(f"refused pickle ({error}); expected a __main__.LMDB_Image") from None
    if type(stored) is not StoredImage or not vars(stored):
        raise ImageError(f"refused pickle (of {type(stored).__name__}); expected a __main__.LMDB_Image")
    return stored


def _image_of_floats(values: bytes) -> Image.Image:
    """Return the RGB image whose pixels MicroLens has turned into floats. Raises ImageError for other values.

    values: float32 [3, 224, 224], each (pixel / 255 - 0.5) / 0.5. They give the pixels back exactly, or not at all.
    """
    if len(values) != 4 * FLOATS[0] * FLOATS[1] * FLOATS[2]:
        raise ImageError(f"floats in {len(values)} bytes; expected {FLOATS}; {COVERS_INSTEAD}")
    floats = np.frombuffer(values, dtype="<f4").reshape(FLOATS)
    pixels = np.nan_to_num((floats * 0.5 + 0.5) * 255).round().clip(0, 255).astype(np.uint8)
    if not np.array_equal((pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5), floats):
        raise ImageError(f"floats that are not (pixel / 255 - 0.5) / 0.5; {COVERS_INSTEAD}")
    return Image.fromarray(pixels.transpose(1, 2, 0))


def _open_lmdb(path: Path) -> lmdb.Environment:
    """Open a database for reading, without a lock file. Raises InputError if it cannot be opened or is damaged."""
    try:
        return open_database(path, subdir=path.is_dir(), lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError(f"{path}: not an LMDB that can be opened ({error})") from None
