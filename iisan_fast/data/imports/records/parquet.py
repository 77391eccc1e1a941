"""Read Parquet files in batches of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ....errors import InputError
from ....files import refuse_irregular
from ....progress import progress_bar
from ..bad_rows import BadRows
from ..polars_module import pl
from ..text.headers import find_columns
from .column_types import as_read, column_paths, refuse_unfit_type, value_column

READ_AT_ONCE = 250_000  # rows
READ_ERRORS = (pl.exceptions.PolarsError, OSError)


class ParquetTable:
    """A Parquet file. A column within a column of structs has the names on its way with points between, as user.id."""

    unit = "row"
    names_may_be_data = False

    def __init__(self, path: Path) -> None:
        """Read the names and types of the columns. Raises InputError if the file cannot be read."""
        refuse_irregular(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        self.path = path
        self._frame = pl.scan_parquet(path, glob=False, hive_partitioning=False)
        try:
            self._schema = self._frame.collect_schema()
        except READ_ERRORS as error:
            raise self._unreadable(error) from None
        self._paths = column_paths(self._schema)
        self.columns = list(self._paths)

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield the given columns ({new name: name in the file}), and each row's number from 1 as `place`.

        Rows with an id that is neither text nor a whole number are added to `bad_rows`. is_row: not used. Raises
        InputError as `bad_rows` says, for types that do not fit, and if the file cannot be read.
        """
        find_columns(self.path, self.columns, columns, self.names_may_be_data)
        chosen = []
        for name, column in columns.items():
            expression, kind = value_column(self._schema, self._paths[column])
            refuse_unfit_type(self.path, name, column, kind)
            chosen.append(expression.alias(name))
        for number, batch in self._raw_batches(self._frame.select(chosen)):
            yield as_read(batch.with_row_index("place", offset=number), bad_rows)

    def _raw_batches(self, frame: pl.LazyFrame) -> Iterator[tuple[int, pl.DataFrame]]:
        """Yield the number of a batch's first row, from 1, and the batch. Raises InputError if one cannot be read."""
        done = 0
        try:
            total = frame.select(pl.len()).collect().item()
            with progress_bar(f"reading {self.path.name}", total, "rows") as advance:
                for batch in frame.collect_batches(chunk_size=READ_AT_ONCE, lazy=True):
                    yield done + 1, batch
                    done += batch.height
                    advance(batch.height)
        except READ_ERRORS as error:
            raise self._unreadable(error, done) from None
        if done != total:  # old versions of polars lost an error
            raise InputError(f"{self.path}: only {done} of {total} rows could be read; is the file damaged?")

    def _unreadable(self, error: Exception, done: int = 0) -> InputError:
        """Return the error of a table that polars cannot read after `done` rows."""
        where = f"{self.path} beyond row {done}" if done else str(self.path)
        return InputError(f"{where}: cannot be read as a table ({str(error).strip().splitlines()[0]})")
