"""Read tables of two tab-separated columns by polars, some megabytes at a time.

Only plain tables are read here, for which polars and the strict reader give equal results. A plain table is UTF-8
without a byte order mark. Each line has two fields that are not blank, one tab between, and no other control character;
a carriage return is one. No id is too long. For any other table NeedsStrictReader is raised. The strict reader then
reads the whole file, and accepts or refuses it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from .growing_arrays import IN_MEMORY, GrowingArrays
from .strict_tables import CONTROL_CHARACTERS, MAX_ID_BYTES
from .text_array import first_repeat

if TYPE_CHECKING:
    import polars as pl

LOGGER = logging.getLogger(__name__)
LEAST_BYTES = 2 << 20  # the strict reader has read a smaller file before polars is imported
BLOCK_BYTES = 4 << 20
TAB, NEWLINE, SPACE = b"\t\n "
BYTE_ORDER_MARK = "\ufeff".encode()

Result = TypeVar("Result")


class NeedsStrictReader(Exception):
    """polars cannot be used for a file; the message says why."""


class NumberRows(NamedTuple):
    """Rows of an id and one or more whole numbers."""

    ids: Sequence[str]
    lengths: np.ndarray  # int64 [rows]
    values: np.ndarray  # the numbers of all rows, one row after the other


def fast_or_strict(fast: Callable[[], Result], strict: Callable[[], Result]) -> Result:
    """Return the result of `fast`, or that of `strict` if `fast` raises NeedsStrictReader."""
    try:
        return fast()
    except NeedsStrictReader as reason:
        LOGGER.debug("%s: read line by line", reason)
    return strict()


def read_texts(path: Path) -> tuple[list[str], list[str]]:
    """Return the two columns of a table. Raises NeedsStrictReader, also if the file cannot be read."""
    ids: list[str] = []
    texts: list[str] = []
    for block in _blocks(path):
        ids += block["id"].to_list()
        texts += block["text"].to_list()
    return ids, texts


def read_item_numbers(path: Path, item_ids: Sequence[str], arrays: GrowingArrays = IN_MEMORY) -> NumberRows:
    """Return the rows of a table whose second column holds item ids, one space between.

    item_ids: unique ids, numbered from 1; the numbers have the dtype of `arrays`, which take what is read. Raises
    NeedsStrictReader, also for an id that is not among them, and for a row's id that occurs twice.
    """
    polars = _polars_for(path)
    numbers = polars.Enum(polars.Series(item_ids, dtype=polars.String))
    ids = arrays.texts("row_ids")
    lengths: list[np.ndarray] = []
    values = arrays.array("items", arrays.item_dtype)
    blocks = _number_blocks(path, lambda words: words.cast(numbers).to_physical().cast(polars.Int64) + 1)
    for block_ids, block_lengths, block_values in blocks:
        ids.extend(block_ids)
        lengths.append(block_lengths)
        values.append(block_values)
    all_ids = ids.finish()
    if first_repeat(all_ids) is not None:
        raise NeedsStrictReader(f"{path}: an id occurs twice")
    return NumberRows(all_ids, np.concatenate(lengths), values.finish())


def read_whole_numbers(path: Path, ids: Sequence[str], arrays: GrowingArrays = IN_MEMORY) -> NumberRows:
    """Return the rows of a table whose second column holds whole numbers of 64 bits, one space between.

    ids: of the rows, in their order. arrays: take the numbers, int64. Raises NeedsStrictReader, also for other rows.
    """
    polars = _polars_for(path)
    lengths: list[np.ndarray] = []
    values = arrays.array(path.stem, np.int64)
    row = 0
    for block_ids, block_lengths, block_values in _number_blocks(path, lambda words: words.cast(polars.Int64)):
        if block_ids != ids[row : row + len(block_ids)]:
            raise NeedsStrictReader(f"{path}: not the users of users.tsv")
        row += len(block_ids)
        lengths.append(block_lengths)
        values.append(block_values)
    if row < len(ids):
        raise NeedsStrictReader(f"{path}: not all users of users.tsv")
    return NumberRows(ids, np.concatenate(lengths), values.finish())


def _number_blocks(
    path: Path, to_numbers: Callable[[pl.Series], pl.Series]
) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """Yield the ids, the lengths and the numbers, both int64, of some rows of a table.

    to_numbers: turns the words of the second column into int64 numbers. Raises NeedsStrictReader for words that are no
    such numbers.
    """
    polars = _polars_for(path)
    for block in _blocks(path):
        words = block["text"].str.split(" ")
        try:
            numbers = to_numbers(words.explode())
        except polars.exceptions.PolarsError as error:
            raise NeedsStrictReader(f"{path}: {error}") from None
        if numbers.null_count():
            raise NeedsStrictReader(f"{path}: a word is missing")
        yield block["id"].to_list(), words.list.len().cast(polars.Int64).to_numpy(), numbers.to_numpy()


def _blocks(path: Path) -> Iterator[pl.DataFrame]:
    """Yield at least one table with the columns `id` and `text`. Raises NeedsStrictReader."""
    polars = _polars_for(path)
    try:
        for content in _whole_lines(path):
            yield _parse(polars, content, path)
    except OSError as error:
        raise NeedsStrictReader(f"{path}: {error}") from None


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yield a file's content, cut between lines; every part ends with a newline. An empty file gives one newline."""
    with path.open("rb") as file:
        content = file.read(BLOCK_BYTES) + file.readline() or b"\n"
        while content:
            yield content if content.endswith(b"\n") else content + b"\n"
            content = file.read(BLOCK_BYTES) + file.readline()


def _parse(polars: ModuleType, content: bytes, path: Path) -> pl.DataFrame:
    """Return the columns `id` and `text` of whole lines. Raises NeedsStrictReader if they are not a plain table."""
    lines = _check_bytes(content, path)
    schema = {"id": polars.String, "text": polars.String}
    try:
        table = polars.read_csv(content, has_header=False, separator="\t", quote_char=None, schema=schema)
    except polars.exceptions.PolarsError as error:
        raise NeedsStrictReader(f"{path}: {error}") from None
    blank = polars.any_horizontal(polars.all().str.strip_chars() == "").any()
    if table.height != lines or sum(table.null_count().row(0)) or table.select(blank).item():
        raise NeedsStrictReader(f"{path}: a blank field")
    unfit = table["id"].str.contains(CONTROL_CHARACTERS) | (table["id"].str.len_bytes() > MAX_ID_BYTES)
    if unfit.any():
        raise NeedsStrictReader(f"{path}: an id that is too long or has a control character")
    return table


def _check_bytes(content: bytes, path: Path) -> int:
    """Return the number of lines. Raises NeedsStrictReader unless each is UTF-8 of two fields with one tab between."""
    codes = np.frombuffer(content, np.uint8)
    places = np.flatnonzero(codes < SPACE)
    controls = codes[places]
    alternate = len(controls) % 2 == 0 and (controls[::2] == TAB).all() and (controls[1::2] == NEWLINE).all()
    if not alternate or (np.diff(places, prepend=-1) == 1).any():
        raise NeedsStrictReader(f"{path}: not two fields and one tab a line")
    if content.startswith(BYTE_ORDER_MARK):
        raise NeedsStrictReader(f"{path}: a byte order mark")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise NeedsStrictReader(f"{path}: {error}") from None
    return len(controls) // 2


def _polars_for(path: Path) -> ModuleType:
    """Import polars to read a file. Raises NeedsStrictReader for a small or absent file, or if polars is missing."""
    try:
        if path.stat().st_size < LEAST_BYTES:
            raise NeedsStrictReader(f"{path}: a small file")
        import polars
    except ImportError:
        raise NeedsStrictReader(f"{path}: polars is not installed") from None
    except OSError as error:
        raise NeedsStrictReader(f"{path}: {error}") from None
    return polars
