"""Read and check interactions and titles from any table that polars can scan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError, first_few
from ...progress import progress_bar
from .frames import pl

READ_AT_ONCE = 250_000  # rows
ID = "an id without spaces, tabs or line ends"
READ_ERRORS = (pl.exceptions.PolarsError, OSError)  # the latter of gzip, without the file's name
EXPECTED = {"user": ID, "item": ID, "timestamp": "a whole number"}


@dataclass(frozen=True)
class Table:
    """A file and the polars query that reads it, which has not run yet."""

    path: Path
    frame: pl.LazyFrame

    def select(self, columns: Mapping[str, str]) -> pl.LazyFrame:
        """Return the given columns ({new name: name in the file}) under their new names; all but timestamps are text.

        Raises InputError if a column is missing, or if users or items are neither text nor whole numbers.
        """
        schema = self.frame.collect_schema()
        for column in columns.values():
            if column not in schema:
                if not "".join(schema).isprintable():
                    raise InputError(f"{self.path}: no header of names in its first line; is it in another format?")
                names = first_few(schema, len(schema), limit=10)
                raise InputError(f"{self.path}: no column {column!r}, only {names}; rename one or name it by an option")
        for name in ("user", "item"):
            kind = schema.get(columns.get(name), pl.String)
            if not (kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum)):
                raise InputError(f"{self.path}: column {columns[name]!r} holds {kind}; expected text or whole numbers")
        return self.frame.select(
            pl.col(column).alias(name) if name == "timestamp" else pl.col(column).cast(pl.String).alias(name)
            for name, column in columns.items()
        )


def csv_table(path: Path, **form: Any) -> Table:
    """Return the table of a text file, which gzip may have compressed; all its columns are text.

    form: further arguments of polars.scan_csv. Raises InputError if there is no such file.
    """
    return Table(path, pl.scan_csv(_existing(path), infer_schema=False, glob=False, **form))


def parquet_table(path: Path) -> Table:
    """Return the table of a Parquet file. Raises InputError if there is no such file."""
    return Table(path, pl.scan_parquet(_existing(path), glob=False))


def read_interactions(table: Table, columns: Mapping[str, str], several_items: bool = False) -> pl.DataFrame:
    """Return all interactions in the order of the file: 16 bytes an interaction, and the text of each id once.

    The columns are user and item, Categorical, with codes in order of first appearance, and timestamp, int64, if
    `columns` ({"user": name in the file, …}) has one. several_items: an item field holds several ids with spaces
    between.

    Raises InputError, with the row (from 1, a header not counted), for an id that is missing or has whitespace and for
    a timestamp that is not a whole number.
    """
    kinds = {name: pl.Categorical(pl.Categories.random()) for name in ("user", "item")}
    parts: list[pl.DataFrame] = []
    done = 0
    try:
        frame = table.select(columns)
        total = frame.select(pl.len()).collect().item()
        with progress_bar(f"reading {table.path.name}", total, "rows") as advance:
            for batch in frame.collect_batches(chunk_size=READ_AT_ONCE, lazy=True):
                rows = batch.with_row_index("row", offset=done + 1)
                if several_items:
                    rows = rows.with_columns(_split(pl.col("item"))).explode("item")
                parts.append(_checked(rows, kinds, table.path))
                done += batch.height
                advance(batch.height)
    except READ_ERRORS as error:
        raise _unreadable(table.path, error, done) from None
    if not total:
        raise InputError(f"{table.path}: holds no interactions")
    if done != total:  # old versions of polars lost an error
        raise InputError(f"{table.path}: only {done} of {total} rows could be read; is one malformed?")
    return pl.concat(parts)


def read_titles(table: Table, item_column: str, title_column: str) -> dict[str, str]:
    """Return {item id: title} of a table, as `titles_of` does. Raises InputError if the table cannot be read."""
    try:
        frame = table.select({"item": item_column, "title": title_column}).collect()
    except READ_ERRORS as error:
        raise _unreadable(table.path, error) from None
    return titles_of(table.path, frame.iter_rows())


def titles_of(path: Path, rows: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Return {item id: title} of the items with a title; runs of whitespace become one space.

    Raises InputError if an item has two different titles.
    """
    titles: dict[str, str] = {}
    for item_id, text in rows:
        title = " ".join((text or "").replace("\0", " ").split())
        if title and titles.setdefault(item_id, title) != title:
            raise InputError(f"{path}: item {item_id!r} has two titles, {titles[item_id]!r} and {title!r}; keep one")
    return titles


def find(folder: Path, *patterns: str) -> Path | None:
    """Return the file that matches the first pattern with a match. Raises InputError if several files match it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    for pattern in patterns:
        matches = sorted(folder.glob(pattern))
        if len(matches) > 1:
            names = first_few((match.name for match in matches), len(matches))
            raise InputError(f"{folder}: expected one {pattern}, found {names}; give each dataset a folder of its own")
        if matches:
            return matches[0]
    return None


def _existing(path: Path) -> Path:
    """Return the path. Raises InputError if there is no such file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path


def _split(items: pl.Expr) -> pl.Expr:
    """Return the lists of ids of texts with one or more spaces between ids."""
    return items.str.strip_chars(" ").str.replace_all(" +", " ").str.split(" ")


def _checked(rows: pl.DataFrame, kinds: Mapping[str, pl.Categorical], path: Path) -> pl.DataFrame:
    """Return rows of text as codes and numbers. Raises InputError for a bad value, with its row.

    One column follows the other, since codes of columns in parallel would come in random order.
    """
    columns = []
    for name, kind in kinds.items():
        ids = rows[name]
        _refuse(rows, ids.is_null() | ids.str.contains(r"^$|[\s\x00]"), name, path)
        columns.append(ids.cast(kind))
    if "timestamp" in rows.columns:
        columns.append(_whole_numbers(rows["timestamp"]))
        _refuse(rows, columns[-1].is_null(), "timestamp", path)
    return pl.DataFrame(columns)


def _whole_numbers(column: pl.Series) -> pl.Series:
    """Return a column of numbers, or of text such as 12, 12.0 or 1.2e1, as Int64; null for all but whole numbers."""
    exact = column.cast(pl.Int64, strict=False)
    if not column.dtype.is_float() and exact.null_count() == 0:
        return exact
    numbers = column.cast(pl.Float64, strict=False)
    whole = numbers.cast(pl.Int64, strict=False)
    whole = whole.set(whole.cast(pl.Float64) != numbers, None)
    return whole if column.dtype.is_float() else exact.zip_with(exact.is_not_null(), whole)


def _refuse(rows: pl.DataFrame, bad: pl.Series, name: str, path: Path) -> None:
    """Raise InputError for the first row that is `bad` (boolean; null counts as bad), naming its row and value."""
    bad = bad.fill_null(True)
    if not bad.any():
        return
    first = bad.arg_max()
    value = rows[name][first]
    shown = "nothing" if value is None else repr(value)
    raise InputError(f"{path} row {rows['row'][first]}: {name}: expected {EXPECTED[name]}, found {shown}")


def _unreadable(path: Path, error: Exception, done: int = 0) -> InputError:
    """Return the error of a table that polars cannot read after `done` rows."""
    where = f"{path} beyond row {done}" if done else str(path)
    return InputError(f"{where}: cannot be read as a table ({str(error).strip().splitlines()[0]})")
