"""Read the catalogue of a dataset folder: titles and captions (TSV), images (a folder or one LMDB).

No input is trusted: a malformed line, image or pickle is an error that says where it is.
"""

from __future__ import annotations

import html
import io
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError, first_few
from ..files import refuse_irregular
from .databases import open_database
from .fast_tables import NeedsStrictReader, fast_or_strict, read_texts
from .image_pickles import StoredImage, unpickle
from .strict_tables import read_table

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # by content: shops do serve a GIF under a .jpg name
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 1 << 29  # of an image file or entry: twice the bytes of MAX_PIXELS uncompressed pixels
MAX_ASPECT = 200  # an encoder that resizes by the shorter side would need too much memory for a thinner strip


class ImageError(InputError):
    """An image that cannot be used. The message is the reason; the caller adds the item id."""


@dataclass(frozen=True)
class ItemTable:
    """The contents of items.tsv and captions.tsv, in the order of the file."""

    ids: list[str]
    titles: list[str]
    captions: dict[str, str] | None  # by item id, for the items that have one; None without captions.tsv


def read_items(root: Path, unescape: bool = True) -> ItemTable:
    """Read root/items.tsv and, if there is one, root/captions.tsv. `unescape`: replace HTML entities by characters.

    Raises InputError, with file and line, for a malformed line, an item that occurs twice, or a caption of an item that
    is not in items.tsv.
    """
    titles = _read_texts(root / "items.tsv", unescape)
    captions = root / "captions.tsv"
    return ItemTable(
        ids=list(titles),
        titles=list(titles.values()),
        captions=_read_texts(captions, unescape, known=titles) if os.path.lexists(captions) else None,
    )


def open_images(root: Path) -> ImageFolder | ImageLmdb:
    """Open the images of a dataset, root/images/ or root/*.lmdb. Raises InputError if there is not exactly one."""
    folder = root / "images"
    databases = sorted(root.glob("*.lmdb"))
    sources = [folder, *databases] if folder.is_dir() else databases
    if len(sources) != 1:
        names = first_few((source.name for source in sources), len(sources)) or "neither"
        raise InputError(f"{root}: expected a folder images or exactly one *.lmdb, found {names}")
    return ImageLmdb(databases[0]) if databases else ImageFolder(folder)


def list_images(path: Path) -> dict[str, str]:
    """Return {item id: file name} of a folder's images. Raises InputError if two files belong to one item.

    A FIFO, a device or a link that leads nowhere is listed too, so that its reader can name it.
    """
    names: dict[str, str] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            item_id, suffix = os.path.splitext(entry.name)
            if suffix.lower() not in IMAGE_SUFFIXES or entry.is_dir():
                continue
            other = names.setdefault(item_id, entry.name)
            if other != entry.name:
                both = " and ".join(sorted((other, entry.name)))
                raise InputError(f"{path}: two images of item {item_id!r}: {both}; keep one")
    return names


def refuse_unfit_name(folder: Path, item_id: str) -> None:
    """Raise InputError if an item id cannot be the name of a file in the folder."""
    if item_id in (".", "..") or any(character in item_id for character in "/\\\0"):
        raise InputError(f"{folder}: item id {item_id!r} cannot be a file's name; rename the item")


class ImageFolder:
    """A folder of images <item_id>.{jpg,jpeg,png,webp}, which is listed once. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        """List the folder. Raises InputError if two files belong to one item."""
        self.path = path
        self._names = list_images(path)

    def __enter__(self) -> ImageFolder:
        """Return the folder itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: no file stays open between reads."""

    def content(self, item_id: str) -> bytes | None:
        """Return the bytes of an item's file, None if it has none. Raises InputError if the file cannot be read."""
        refuse_unfit_name(self.path, item_id)
        if item_id not in self._names:
            return None
        file = self.path / self._names[item_id]
        refuse_irregular(file)
        try:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise InputError(f"{file}: giant file: over {MAX_FILE_BYTES} bytes; make the image smaller")
            return file.read_bytes()
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from None

    @staticmethod
    def decode(content: bytes) -> Image.Image:
        """Decode the bytes of a file: RGB, upright, on white. Raises ImageError if the image is damaged or giant."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            _refuse_giant(*image.size)
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
        except ImageError:
            raise
        except UnidentifiedImageError:
            raise ImageError(f"not an image of {', '.join(IMAGE_FORMATS)}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ImageError(f"giant image: over {MAX_PIXELS // 1_000_000} megapixels") from None
        except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
            raise ImageError(f"damaged image ({type(error).__name__}: {error})") from None


class ImageLmdb:
    """The released research project's image LMDB: pickled `__main__.LMDB_Image` objects by item id.

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
            if stored.id != item_id and self._get(stored.id) is not None:
                other = f"holds the image of item {stored.id[:100]!r}"
                raise InputError(f"{self.path}: entry {item_id!r} {other}; write the database again")
        return value

    @staticmethod
    def decode(content: bytes) -> Image.Image:
        """Decode a pickle: RGB, on white. Raises ImageError if the image is giant or its bytes do not fit its size."""
        stored = _unpickle_image(content)
        height, width = stored.size
        mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(stored.channels)
        if mode is None or min(stored.size) < 1 or height * width * stored.channels != len(stored.image):
            shape = f"{height} x {width} pixels of {stored.channels} channels"
            raise ImageError(f"damaged image: {shape} in {len(stored.image)} bytes")
        _refuse_giant(width, height)
        return _to_rgb(Image.frombytes(mode, (width, height), stored.image))

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
            raise InputError(f"{self.path}: no entry {key!r}; expected the released project's image LMDB")
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


def _read_texts(path: Path, unescape: bool, known: Collection[str] | None = None) -> dict[str, str]:
    """Return {item id: text} in file order. Raises InputError for a malformed line, or an item that is not `known`."""
    texts = fast_or_strict(lambda: _read_texts_fast(path, known), lambda: _read_texts_strictly(path, known))
    return {item_id: html.unescape(text) for item_id, text in texts.items()} if unescape else texts


def _read_texts_fast(path: Path, known: Collection[str] | None) -> dict[str, str]:
    """Read {item id: text} by polars. Raises NeedsStrictReader if anything in the file may be wrong."""
    ids, column = read_texts(path)
    texts = dict(zip(ids, column))
    if len(texts) < len(ids) or any(" " in item_id for item_id in ids):
        raise NeedsStrictReader(f"{path}: an item twice, or an id with a space")
    if known is not None and not all(item_id in known for item_id in ids):
        raise NeedsStrictReader(f"{path}: an unknown item")
    return texts


def _read_texts_strictly(path: Path, known: Collection[str] | None) -> dict[str, str]:
    """Read {item id: text} line by line. Raises InputError, with file and line."""
    texts: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, (item_id, text) in read_table(path, 2):
        if item_id in lines:
            raise InputError(f"{path} line {line}: item {item_id!r} stands on line {lines[item_id]} already")
        if known is not None and item_id not in known:
            raise InputError(f"{path} line {line}: item {item_id!r} is not in items.tsv")
        if " " in item_id or "\0" in item_id:
            raise InputError(f"{path} line {line}: item id {item_id!r} has a space or NUL, which no history can name")
        lines[item_id] = line
        texts[item_id] = text
    return texts


def _refuse_giant(width: int, height: int) -> None:
    """Raise ImageError if an image has more than MAX_PIXELS pixels or one side is MAX_ASPECT times the other."""
    if width * height > MAX_PIXELS:
        raise ImageError(f"giant image: {width} x {height} is over {MAX_PIXELS // 1_000_000} megapixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"giant image: {width} x {height} is longer than {MAX_ASPECT} times its width")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB, transparent parts on white."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


def _unpickle_image(value: bytes) -> StoredImage:
    """Return the LMDB_Image of a pickle. Raises ImageError if it holds anything else."""
    try:
        stored = unpickle(value)
    except pickle.UnpicklingError as error:
        raise ImageError(f"refused pickle ({error}); expected a __main__.LMDB_Image") from None
    if type(stored) is not StoredImage or not vars(stored):
        raise ImageError(f"refused pickle (of {type(stored).__name__}); expected a __main__.LMDB_Image")
    return stored


def _open_lmdb(path: Path) -> lmdb.Environment:
    """Open a database for reading, without a lock file. Raises InputError if it cannot be opened or is damaged."""
    try:
        return open_database(path, subdir=path.is_dir(), lock=False, readahead=False)
    except lmdb.Error as error:
        raise InputError(f"{path}: not an LMDB that can be opened ({error})") from None
