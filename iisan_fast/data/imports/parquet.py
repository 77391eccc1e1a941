"""Read Parquet files in batches of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ...errors import InputError
from ...files import refuse_irregular
from ...progress import progress_bar
from .bad_rows import BadRows
from .headers import find_columns
from .polars_module import pl

READ_AT_ONCE = 250_000  # rows
READ_ERRORS = (pl.exceptions.PolarsError, OSError)


class ParquetTable:
    """A Parquet file."""

    unit = "row"
    names_may_be_data = False

    def __init__(self, path: Path) -> None:
        """Read the names and types of the columns. Raises InputError if the file cannot be read."""
        refuse_irregular(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        self.path = path
        self._frame = pl.scan_parquet(path, glob=False)
        try:
            self._schema = self._frame.collect_schema()
        except READ_ERRORS as error:
            raise self._unreadable(error) from None
        self.columns = list(self._schema)

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield the given columns ({new name: name in the file}), and each row's number from 1 as `place`.

        All but timestamps are text. bad_rows, is_row: not used, since each row of Parquet has all columns. Raises
        InputError for types that do not fit, and if the file cannot be read.
        """
        find_columns(self.path, self.columns, columns, self.names_may_be_data)
        frame = self._frame.select(self._read(name, column) for name, column in columns.items())
        done = 0
        try:
            total = frame.select(pl.len()).collect().item()
            with progress_bar(f"reading {self.path.name}", total, "rows") as advance:
                for batch in frame.collect_batches(chunk_size=READ_AT_ONCE, lazy=True):
                    yield batch.with_row_index("place", offset=done + 1)
                    done += batch.height
                    advance(batch.height)
        except READ_ERRORS as error:
            raise self._unreadable(error, done) from None
        if done != total:  # old versions of polars lost an error
            raise InputError(f"{self.path}: only {done} of {total} rows could be read; is the file damaged?")

    def _read(self, name: str, column: str) -> pl.Expr:
        """Return the expression that reads a column under a new name. Raises InputError if its type does not fit."""
        kind = self._schema[column]
        is_text = kind in (pl.String, pl.Categorical, pl.Enum)
        if name == "timestamp":
            fits = is_text or kind.is_numeric() or kind in (pl.Date, pl.Datetime)
            expected = "numbers or times"
        else:
            fits = is_text or kind.is_integer() or (name == "title" and not kind.is_nested())
            expected = "text or whole numbers"
        if not fits:
            raise InputError(f"{self.path}: column {column!r} holds {kind}; expected {expected}")
        read = pl.col(column).alias(name)
        return read if name == "timestamp" and not is_text else read.cast(pl.String)

    def _unreadable(self, error: Exception, done: int = 0) -> InputError:
        """Return the error of a table that polars cannot read after `done` rows."""
        where = f"{self.path} beyond row {done}" if done else str(self.path)
        return InputError(f"{where}: cannot be read as a table ({str(error).strip().splitlines()[0]})")
