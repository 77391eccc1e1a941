"""Read CSV and other delimited text some megabytes at a time: rows are found first, polars then reads their fields."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from ....errors import InputError
from ....files import refuse_irregular
from ....progress import progress_bar
from ..bad_rows import BadRows
from ..polars_module import pl
from ..reading_ahead import read_ahead
from .delimited_blocks import regular_rows
from .delimited_form import BLANK, MAX_ROW_BYTES, UTF_8, Form, Unfinished, UnfitRow, WholeRows, next_row
from .delimited_rows import LOOKED_AT, checked_rows, quotes_enclose_fields
from .encodings import checked_encoding, report_utf_8, undecoded
from .headers import (
    NO_HEADER,
    check_columns,
    check_header,
    fit_header,
    refuse_empty,
    refuse_header,
    refuse_other_format,
)
from .separators import ADVICE, QUOTING, find_separator, sample_rows, separator_of, shown_separator
from .text_stream import BYTE_ORDER_MARK, encoding_hint, open_text, read_beginning

BLOCK_BYTES = 4 << 20
MEGABYTE = 1_000_000


class DelimitedText:
    """A text file of rows, which gzip, bzip2 or xz may have compressed. All columns are text."""

    unit = "line"  # places of rows count lines from 1, the header's included

    def __init__(
        self,
        path: Path,
        separator: str | None = None,
        quoted: bool | None = None,
        columns: Sequence[str] | None = None,
        names_of: Callable[[Path, list[str]], list[str]] | None = None,
        encoding: str | None = None,
        usual_separator: str | None = None,
        has_options: bool = True,
    ) -> None:
        """Read the header.

        separator: as `separator_of` reads it; None: found by looking at the first rows. quoted: True if quotes may
        enclose fields; None: as the separator and the rows say. columns: the names of a file without a header.
        names_of: makes names of the fields of a header that is known by its form, and refuses all else. encoding: of
        Python's; None: UTF-8, or as a byte order mark says. usual_separator: used without looking if it is in the first
        line. has_options: the command has --encoding and --separator, for messages.

        Raises InputError if there is no such file, if its separator is not plain, and if its header is no header.
        """
        refuse_irregular(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        self.path = path
        self._has_header = columns is None
        self.names_may_be_data = self._has_header and names_of is None
        self._encoding = None if encoding is None else checked_encoding(encoding)
        self._has_options = has_options
        self._beginning = read_beginning(path, self._encoding)
        if self._encoding not in (None, UTF_8):
            report_utf_8(path, self._encoding)
        rows = self._beginning.rows
        if columns is None:
            refuse_empty(path, rows)
            refuse_other_format(path, rows if separator is None else rows.replace(separator_of(separator), b","))
            self._refuse_other_encoding(rows)
        self._separator = self._find_separator(separator, usual_separator, columns, names_of is not None)
        self._quoted = (True if self._separator in QUOTING else None) if quoted is None else quoted
        self._start = self._beginning.skipped
        if columns is not None:
            self.columns = check_columns(columns)
            return
        fields, end = self._header_of(rows)
        self._start += end
        if names_of is not None:
            fields = names_of(path, fields)
        elif below := sample_rows(rows[end:], self._separator):
            fields = fit_header(fields, below)
        self.columns = check_header(path, fields)

    def first_fields(self) -> list[str]:
        """Return the fields of the first line, as of a header. Raises InputError if it is empty, or no such line."""
        refuse_empty(self.path, self._beginning.rows)
        return self._header_of(self._beginning.rows)[0]

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield the given columns ({new name: name in the file}) of the rows that fit, with their lines as `place`.

        Rows that do not fit are added to `bad_rows`. is_row: True if text under the new names can only be a row, and
        no part of a quoted field. Raises InputError as `bad_rows` says, and if the file cannot be read.
        """
        places = {name: self.columns.index(column) for name, column in columns.items()}
        if not self._has_header:
            ids = [column for name, column in columns.items() if name in ("user", "item")]
            refuse_header(self.path, self.columns, ids, sample_rows(self._beginning.rows, self._separator)[:1])
        test = None if is_row is None else lambda fields: is_row({name: fields[at] for name, at in places.items()})
        form = Form(self._separator, self._quoted, len(self.columns), test, self._beginning.encoding)
        return read_ahead(self._frame(rows, places) for rows in self._rows(form, bad_rows) if len(rows.lines))

    def _rows(self, form: Form, bad_rows: BadRows) -> Iterator[WholeRows]:
        """Yield the rows that fit, some megabytes at a time. Raises InputError as `batches` does."""
        size = self.path.stat().st_size
        with (
            open_text(self.path, self._encoding) as text,
            progress_bar(f"reading {self.path.name}", size // MEGABYTE, "MB") as advance,
        ):
            content = b""
            while len(content) < self._start and (more := text.read(max(BLOCK_BYTES, self._start))):
                content += more
            line = 1 + content.count(b"\n", 0, self._start)
            content = content[self._start :]
            done = 0
            at_end = False
            while not at_end:
                more = text.read(BLOCK_BYTES)
                at_end = not more
                content += more if more or content.endswith(b"\n") else b"\n"
                if form.quoted is None and b'"' in content:
                    if not at_end and len(content) - content.index(b'"') < LOOKED_AT:
                        continue
                    form = form._replace(quoted=quotes_enclose_fields(content, form))
                rows = regular_rows(content, form, line)
                if rows is None or (at_end and content[rows.used :].strip(BLANK)):
                    hint = partial(encoding_hint, self.path, bad_rows.hint, self._has_options)
                    rows = checked_rows(content, form, line, at_end, bad_rows, hint)
                yield rows
                if not rows.used and len(content) > MAX_ROW_BYTES:
                    raise InputError(f"{self.path} line {line}: longer than {MAX_ROW_BYTES >> 20} MB; is it a table?")
                line += content.count(b"\n", 0, rows.used)
                content = content[rows.used :]
                advance(text.place() // MEGABYTE - done)
                done = text.place() // MEGABYTE

    def _refuse_other_encoding(self, sample: bytes) -> None:
        """Raise InputError if the first line is in another encoding."""
        problem = undecoded(sample[: sample.index(b"\n")], self._beginning.encoding)
        if problem is not None:
            raise InputError(
                f"{self.path} line 1: {problem}; {encoding_hint(self.path, 'correct it', self._has_options)}"
            )

    def _find_separator(
        self, separator: str | None, usual: str | None, columns: Sequence[str] | None, fixed: bool
    ) -> bytes:
        """Return the separator. fixed: a header of this form has the usual one if none is plain. Raises InputError."""
        sample = self._beginning.rows
        plain = find_separator(sample, None if columns is None else len(columns))
        first = sample[: sample.index(b"\n")]
        if separator is not None:
            expected = separator_of(separator)
            if columns is None and expected not in first and plain not in (None, expected) and plain in first:
                words = f"expected {shown_separator(expected)} between fields, found {shown_separator(plain)}"
                advice = (
                    f"write the file with {shown_separator(expected)}"
                    if not self._has_options
                    else "leave out --separator"
                )
                raise InputError(f"{self.path} line 1: {words}; {advice}")
            return expected
        if self._beginning.separator is not None:
            return self._beginning.separator
        if usual is not None and separator_of(usual) in first:
            return separator_of(usual)
        if plain is None and fixed:
            return separator_of(usual or "comma")
        if plain is None:
            shown = first[:60].decode(errors="replace")
            raise InputError(f"{self.path} line 1: no plain separator between the fields of {shown!r}; {ADVICE}")
        return plain

    def _header_of(self, sample: bytes) -> tuple[list[str], int]:
        """Return the fields of the first line, and the place behind it. Raises InputError if it is no such line."""
        try:
            try:
                fields, end = next_row(sample, 0, Form(self._separator, self._quoted is not False, 0))
            except (UnfitRow, Unfinished):
                if self._quoted is not None:
                    raise
                fields, end = next_row(sample, 0, Form(self._separator, False, 0))
            return [field.decode().strip(" ") for field in fields], end
        except (UnfitRow, Unfinished) as unfit:
            problem = str(unfit) or "a quoted field does not end"
            raise InputError(f"{self.path} line 1: {problem}") from None
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: {NO_HEADER}") from None

    def _frame(self, rows: WholeRows, places: Mapping[str, int]) -> pl.DataFrame:
        """Return the columns at the given places of the rows. Raises InputError if polars reads other rows."""
        mark = BYTE_ORDER_MARK if rows.content.startswith(BYTE_ORDER_MARK) else b""  # polars leaves out the first one
        names = [f"column {number}" for number in range(len(self.columns))]
        try:
            frame = pl.read_csv(
                io.BytesIO(mark + rows.content if mark else rows.content),
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
        if b" " in rows.content:  # spaces beside separators are no part of a field
            frame = frame.with_columns(pl.all().str.strip_chars(" ").replace("", None))
        columns = [frame[names[place]].alias(name) for name, place in places.items()]
        return pl.DataFrame([*columns, pl.Series("place", rows.lines)])
