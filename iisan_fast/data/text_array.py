"""Many texts as one array of bytes, which may lie in a mapped file: a list of strings takes ten times the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from xxhash import xxh3_64_intdigest

from .jagged_arrays import places

TEXTS_AT_ONCE = 1 << 16


class TextArray(Sequence[str]):
    """Texts that are decoded where they are read. It equals a list, or another one, of the same texts."""

    def __init__(self, content: np.ndarray, ends: np.ndarray) -> None:
        """Take the UTF-8 bytes of all texts, uint8, and the end of each in them, int64. They are not checked."""
        self.content = content
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return a text, or the list of some that follow each other. Raises IndexError for one that is not there."""
        if isinstance(index, slice):
            first, end, step = index.indices(len(self))
            if step != 1:
                return [self[number] for number in range(first, end, step)]
            return [text.decode() for text in self.encoded(first, max(first, end))]
        number = range(len(self))[index]
        return self.encoded(number, number + 1)[0].decode()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), TEXTS_AT_ONCE):
            yield from self[first : first + TEXTS_AT_ONCE]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (TextArray, list)):
            return NotImplemented
        return len(self) == len(other) and all(
            self[first : first + TEXTS_AT_ONCE] == other[first : first + TEXTS_AT_ONCE]
            for first in range(0, len(self), TEXTS_AT_ONCE)
        )

    def __rmul__(self, times: int) -> TextArray:
        """Return the texts several times, as `times * list` does."""
        ends = [self.ends + number * len(self.content) for number in range(times)]
        return TextArray(np.tile(self.content, times), np.concatenate([np.empty(0, np.int64), *ends]))

    __hash__ = None  # type: ignore[assignment]  # as a list has none

    def encoded(self, first: int, end: int) -> list[bytes]:
        """Return the bytes of the texts from `first` to before `end`."""
        ends = self.ends[first:end].tolist()
        start = int(self.ends[first - 1]) if first else 0
        content = self.content[start : ends[-1] if ends else start].tobytes()
        starts = [start, *ends[:-1]]
        return [content[begin - start : stop - start] for begin, stop in zip(starts, ends)]

    def packed(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of some texts, one after the other, uint8, and the length of each, int64. rows: int64."""
        stops = self.ends[rows]
        starts = np.where(rows > 0, self.ends[np.maximum(rows - 1, 0)], 0)
        lengths = stops - starts
        return self.content[places(starts, lengths)], lengths

    def hashes(self) -> np.ndarray:
        """Return a hash of each text, uint64."""
        hashes = np.empty(len(self), dtype=np.uint64)
        for first in range(0, len(self), TEXTS_AT_ONCE):
            encoded = self.encoded(first, min(first + TEXTS_AT_ONCE, len(self)))
            hashes[first : first + len(encoded)] = np.fromiter(map(xxh3_64_intdigest, encoded), np.uint64, len(encoded))
        return hashes


def first_repeat(texts: Sequence[str]) -> tuple[int, int] | None:
    """Return the places of the first text that stands a second time: of the second one and of the first one.

    None if all differ. A TextArray's texts are compared by their hashes, and equal hashes by the texts, so that there
    is never a set of all.
    """
    numbers = range(len(texts))
    if isinstance(texts, TextArray):
        hashes = texts.hashes()
        in_order = np.sort(hashes)
        repeated = in_order[1:][in_order[1:] == in_order[:-1]]
        numbers = np.flatnonzero(np.isin(hashes, repeated)).tolist()
    elif len(set(texts)) == len(texts):
        return None
    seen: dict[str, int] = {}
    for number in numbers:
        before = seen.setdefault(texts[number], number)
        if before != number:
            return number, before
    return None
