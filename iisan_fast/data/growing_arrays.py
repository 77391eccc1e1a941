"""Arrays and texts that grow block by block: in memory, or in files of a folder, which are mapped at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .text_array import TEXTS_AT_ONCE, TextArray


class GrowingArrays:
    """Begins arrays that grow, all in memory or all in one folder."""

    def __init__(self, folder: Path | None = None, item_dtype: type[np.signedinteger[Any]] = np.int64) -> None:
        """Take the folder of the files; None keeps the arrays in memory. item_dtype: of item numbers."""
        self.folder = folder
        self.item_dtype = item_dtype

    def array(self, name: str, dtype: type[np.generic]) -> GrowingArray:
        """Begin an array of one dimension. Raises OSError if its file cannot be made."""
        return GrowingArray(None if self.folder is None else array_file(self.folder, name), dtype)

    def texts(self, name: str) -> GrowingTexts:
        """Begin a sequence of texts. Raises OSError if its files cannot be made."""
        return GrowingTexts(self, name)


IN_MEMORY = GrowingArrays()


class GrowingArray:
    """One array that grows."""

    def __init__(self, path: Path | None, dtype: type[np.generic]) -> None:
        """Take the file of the array; None keeps it in memory. Raises OSError if the file cannot be made."""
        self._path = path
        self._dtype = np.dtype(dtype)
        self._blocks: list[np.ndarray] = []
        if path is not None:
            path.write_bytes(b"")

    def append(self, block: np.ndarray) -> None:
        """Add a block, whose numbers fit the array's dtype. Raises OSError if there is no room for it."""
        block = block.astype(self._dtype, copy=False)
        if self._path is None:
            self._blocks.append(block)
        elif len(block):
            with self._path.open("ab") as file:
                file.write(np.ascontiguousarray(block).data)

    def finish(self) -> np.ndarray:
        """Return the whole array, which grows no more. Raises OSError if its file cannot be mapped."""
        if self._path is None:
            return np.concatenate(self._blocks) if self._blocks else np.empty(0, self._dtype)
        return mapped_array(self._path, self._dtype)


class GrowingTexts:
    """Texts that grow: a list in memory, a TextArray in files."""

    def __init__(self, arrays: GrowingArrays, name: str) -> None:
        """Begin in memory or in two files, as `arrays` does. Raises OSError if these cannot be made."""
        self._texts: list[str] = []
        self._bytes = 0
        self._content: GrowingArray | None = None
        if arrays.folder is not None:
            self._content = arrays.array(name, np.uint8)
            self._ends = arrays.array(ends_name(name), np.int64)

    def extend(self, texts: Iterable[str]) -> None:
        """Add some texts. Raises OSError if there is no room for them."""
        self._texts += texts
        if self._content is not None and len(self._texts) >= TEXTS_AT_ONCE:
            self._flush()

    def extend_by(self, texts: Sequence[str], rows: np.ndarray) -> None:
        """Add the texts that stand in some rows, int64, of others. Raises OSError if there is no room for them."""
        if self._content is None or not isinstance(texts, TextArray):
            self.extend([texts[row] for row in rows])
            return
        self._flush()
        for first in range(0, len(rows), TEXTS_AT_ONCE):
            self._add(*texts.packed(rows[first : first + TEXTS_AT_ONCE]))

    def finish(self) -> list[str] | TextArray:
        """Return all texts, which grow no more. Raises OSError if there is no room for them."""
        if self._content is None:
            return self._texts
        self._flush()
        return TextArray(self._content.finish(), self._ends.finish())

    def _flush(self) -> None:
        """Write the texts that wait for more of them."""
        encoded = [text.encode() for text in self._texts]
        self._texts = []
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        self._add(np.frombuffer(b"".join(encoded), np.uint8), lengths)

    def _add(self, content: np.ndarray, lengths: np.ndarray) -> None:
        """Add the bytes of some texts, uint8, and the length of each, int64."""
        self._content.append(content)
        self._ends.append(np.cumsum(lengths) + self._bytes)
        self._bytes += len(content)


def array_file(folder: Path, name: str) -> Path:
    """Return the file of an array by its name: its numbers as they lie in memory, nothing else."""
    return folder / f"{name}.bin"


def ends_name(name: str) -> str:
    """Return the name of the array that holds where each of some texts ends."""
    return f"{name}_ends"


def mapped_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """Return the array in a file, which is read where it is used, read-only. Raises OSError if it cannot be read."""
    count = path.stat().st_size // dtype.itemsize
    if not count:  # no system maps an empty file
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", shape=(count,)).view(np.ndarray)
