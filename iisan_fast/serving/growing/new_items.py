"""Read items that join a run's catalogue: ids, titles and captions from a file, or from a table of Python."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...data import ItemContents, as_polars, open_image_files, read_table, read_table_file, refuse_unfit_id
from ...errors import InputError, first_few
from ...files import as_path
from ...setting_sources import PathLike

if TYPE_CHECKING:
    import polars as pl

WHERE = "items"
COLUMNS = ("item_id", "title", "caption")


@contextmanager
def open_new_items(items: object, images: PathLike | None) -> Iterator[ItemContents]:
    """Yield the contents of new items. Their images are not read yet, and close at the end.

    items: a file, as `read_new_items` reads it, or a table of Python. images: a folder of images named by item id, or
    an LMDB. Raises InputError as `read_new_items` does, and if there are no images there.
    """
    contents = read_new_items(items)
    if images is None:
        yield contents
        return
    with open_image_files(as_path("images", images)) as opened:
        yield contents._replace(images=opened)


def read_new_items(items: object) -> ItemContents:
    """Return the ids and texts of a file or of a table of Python, all checked, without images.

    items: the path of a .tsv file as items.tsv is (an id, a tab and a title a line), or of a .csv, .parquet or .jsonl
    file with the columns item_id, title and, if there are any, caption; or a table of Python with these columns.

    Raises InputError, in one line with file and line or row, for a file that cannot be read, a missing column, an id
    that occurs twice or that no history can name, and an empty title.
    """
    if not isinstance(items, (str, os.PathLike)):
        return _of_table(as_polars(items, WHERE), WHERE)
    path = as_path(WHERE, items)
    if path.suffix.lower() == ".tsv" and not _has_header(path):
        return _of_lines(path)
    return _of_table(read_table_file(path, WHERE), str(path))


def read_item_ids(path: Path) -> list[str]:
    """Return the item ids of a file: one a line, or the column item_id of a .csv, .parquet or .jsonl file.

    Raises InputError for a file that cannot be read, that holds no id, or that lacks the column.
    """
    if path.suffix.lower() in (".csv", ".parquet", ".jsonl"):
        table = read_table_file(path, WHERE)
        if "item_id" not in table.columns:
            raise InputError(f"{path}: expected the column item_id, found {', '.join(table.columns)}")
        return table["item_id"].to_list()
    return [item_id for _, (item_id,) in read_table(path, 1)]


def _has_header(path: Path) -> bool:
    """Return True if the first line of a table names its columns. A file that cannot be read has none."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline(1024).removeprefix(b"\xef\xbb\xbf").split(b"\t")[0] == b"item_id"


def _of_lines(path: Path) -> ItemContents:
    """Return the items of a file like items.tsv. Raises InputError, with file and line."""
    lines: dict[str, int] = {}
    titles = []
    for line, (item_id, title) in read_table(path, 2):
        if item_id in lines:
            raise InputError(f"{path} line {line}: item {item_id!r} stands on line {lines[item_id]} already")
        _refuse_unfit_item_id(item_id, f"{path} line {line}")
        lines[item_id] = line
        titles.append(title)
    return ItemContents(list(lines), titles, [None] * len(titles))


def _of_table(table: pl.DataFrame, where: str) -> ItemContents:
    """Return the items of a table. Raises InputError, with the row, as `read_new_items` does."""
    if lacking := [name for name in COLUMNS[:2] if name not in table.columns]:
        raise InputError(
            f"{where}: expected the columns item_id and title, found {', '.join(table.columns) or 'none'}; "
            f"{lacking[0]} is missing"
        )
    if not table.height:
        raise InputError(f"{where}: expected items, found none")
    item_ids = table["item_id"].to_list()
    for row, item_id in enumerate(item_ids, start=1):
        _refuse_unfit_item_id(item_id, f"{where} row {row}")
    titles = _texts(table, "title", where)
    if untitled := [item_id for item_id, title in zip(item_ids, titles) if title is None]:
        raise InputError(
            f"{where}: expected a title for each item, found {len(untitled)} without one "
            f"({first_few(untitled, len(untitled))})"
        )
    if repeated := [item_id for item_id, count in Counter(item_ids).items() if count > 1]:
        raise InputError(
            f"{where}: expected each item once, found {len(repeated)} that occur again "
            f"({first_few(repeated, len(repeated))}); keep one row of each"
        )
    captions = _texts(table, "caption", where) if "caption" in table.columns else [None] * len(item_ids)
    return ItemContents(item_ids, [title or "" for title in titles], captions)


def _texts(table: pl.DataFrame, column: str, where: str) -> list[str | None]:
    """Return the texts of a column, with one space for each run of white space; None for an empty one.

    Raises InputError if the column holds no texts.
    """
    values = table[column].to_list()
    if other := [value for value in values if value is not None and not isinstance(value, str)]:
        raise InputError(f"{where}: {column}: expected text, found {other[0]!r}")
    return [" ".join((value or "").replace("\0", " ").split()) or None for value in values]


def _refuse_unfit_item_id(item_id: str, where: str) -> None:
    """Raise InputError, naming `where`, for an id that no history can name."""
    if not item_id.strip():
        raise InputError(f"{where}: the item id is empty")
    refuse_unfit_id(item_id, where)
    if " " in item_id:
        raise InputError(f"{where}: item id {item_id!r} has a space, which no history can name")
