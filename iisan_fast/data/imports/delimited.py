"""Read CSV and other delimited text some megabytes at a time: rows are found first, polars then reads their fields."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ...errors import InputError
from ...files import refuse_irregular
from ...progress import progress_bar
from .bad_rows import BadRows
from .delimited_rows import MAX_ROW_BYTES, Form, Unfinished, UnfitRow, WholeRows, checked_rows, next_row, regular_rows
from .headers import check_columns, check_header, refuse_other_separator
from .polars_module import pl

BLOCK_BYTES = 4 << 20
BYTE_ORDER_MARK = "\ufeff".encode()
GZIP_MAGIC = b"\x1f\x8b"
MEGABYTE = 1_000_000


class DelimitedText:
    """A text file of rows, which gzip may have compressed. All columns are text."""

    unit = "line"  # places of rows count lines from 1, the header's included

    def __init__(
        self,
        path: Path,
        separator: str = ",",
        quoted: bool = True,
        columns: Sequence[str] | None = None,
        names_of: Callable[[Path, list[str]], list[str]] | None = None,
    ) -> None:
        """Read the header. columns: the names of a file without a header.

        names_of: makes names of the fields of a header that is known by its form, and refuses all else. Raises
        InputError if there is no such file, and if its header is no header.
        """
        refuse_irregular(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        self.path = path
        self._separator = separator.encode()
        self._quoted = quoted
        self._has_header = columns is None
        self.names_may_be_data = self._has_header and names_of is None
        if columns is not None:
            self.columns = check_columns(columns)
        else:
            fields = self.first_fields()
            refuse_other_separator(path, fields, separator)
            self.columns = check_header(path, fields if names_of is None else names_of(path, fields))

    def first_fields(self) -> list[str]:
        """Return the fields of the first line. Raises InputError if it is empty, or no line of fields."""
        with _opened(self.path) as (file, _):
            content = file.read(MAX_ROW_BYTES).removeprefix(BYTE_ORDER_MARK)
        if not content.partition(b"\n")[0].rstrip(b"\r"):
            what = "the first line is empty" if content.strip(b"\r\n") else "empty"
            raise InputError(f"{self.path}: {what}; expected a header of names in it")
        fields, _ = self._header_of(content if b"\n" in content else content + b"\n")
        try:
            return [field.decode() for field in fields]
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: no header of names in its first line; is it in another format?") from None

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield the given columns ({new name: name in the file}) of the rows that fit, with their lines as `place`.

        Rows that do not fit are added to `bad_rows`. is_row: True if text under the new names can only be a row, and
        no part of a quoted field. Raises InputError as `bad_rows` says, and if the file cannot be read.
        """
        places = {name: self.columns.index(column) for name, column in columns.items()}
        test = None if is_row is None else lambda fields: is_row({name: fields[at] for name, at in places.items()})
        form = Form(self._separator, self._quoted, len(self.columns), test)
        for rows in self._rows(form, bad_rows):
            if len(rows.lines):
                yield self._frame(rows, places)

    def _rows(self, form: Form, bad_rows: BadRows) -> Iterator[WholeRows]:
        """Yield the rows that fit, some megabytes at a time. Raises InputError as `batches` does."""
        size = self.path.stat().st_size
        with (
            _opened(self.path) as (file, compressed),
            progress_bar(f"reading {self.path.name}", size // MEGABYTE, "MB") as advance,
        ):
            content = file.read(BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK)
            line = 1
            done = 0
            at_end = False
            if self._has_header:
                content += file.read(MAX_ROW_BYTES) if b"\n" not in content else b""
                _, start = self._header_of(content if b"\n" in content else content + b"\n")
                line += content.count(b"\n", 0, start)
                content = content[start:]
            while not at_end:
                more = file.read(BLOCK_BYTES)
                at_end = not more
                content += more if more or content.endswith(b"\n") else b"\n"
                rows = regular_rows(content, form, line)
                if rows is None or (at_end and content[rows.used :].strip(b"\r\n")):
                    rows = checked_rows(content, form, line, at_end, bad_rows)
                yield rows
                if not rows.used and len(content) > MAX_ROW_BYTES:
                    raise InputError(f"{self.path} line {line}: longer than {MAX_ROW_BYTES >> 20} MB; is it a table?")
                line += content.count(b"\n", 0, rows.used)
                content = content[rows.used :]
                advance(compressed.tell() // MEGABYTE - done)
                done = compressed.tell() // MEGABYTE

    def _header_of(self, content: bytes) -> tuple[list[bytes], int]:
        """Return the fields of the first line, and the place behind it. Raises InputError if it is no such line."""
        try:
            return next_row(content, 0, Form(self._separator, self._quoted, 0))
        except (UnfitRow, Unfinished) as unfit:
            problem = str(unfit) or "a quoted field does not end"
            if not content[:1000].split(b"\n")[0].replace(b"\r", b"").decode(errors="replace").isprintable():
                raise InputError(
                    f"{self.path}: no header of names in its first line; is it in another format?"
                ) from None
            raise InputError(f"{self.path} line 1: {problem}") from None

    def _frame(self, rows: WholeRows, places: Mapping[str, int]) -> pl.DataFrame:
        """Return the columns at the given places of the rows. Raises InputError if polars reads other rows."""
        names = [f"column {number}" for number in range(len(self.columns))]
        try:
            frame = pl.read_csv(
                io.BytesIO(rows.content),
                has_header=False,
                schema=dict.fromkeys(names, pl.String),
                columns=sorted({*places.values()}),
                separator=rows.separator.decode(),
                eol_char=rows.row_end.decode(),
                quote_char=None,
            )
        except pl.exceptions.PolarsError as error:
            raise InputError(f"{self.path} line {rows.lines[0]}: polars cannot read on ({error})") from None
        if frame.height != len(rows.lines):
            counts = f"expected {len(rows.lines)} rows, polars read {frame.height}"
            raise InputError(f"{self.path} line {rows.lines[0]}: {counts}")
        columns = [frame[names[place]].alias(name) for name, place in places.items()]
        return pl.DataFrame([*columns, pl.Series("place", rows.lines)])


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file: its text, uncompressed, and its bytes as they are. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(GZIP_MAGIC))
            file.seek(0)
            if magic != GZIP_MAGIC:
                yield file, file
                return
            with gzip.open(file) as text:
                yield text, file
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from None
