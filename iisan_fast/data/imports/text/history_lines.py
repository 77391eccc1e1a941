"""Read text whose lines hold a user and then any number of items, with one separator between all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ....errors import InputError
from ....files import refuse_irregular
from ..bad_rows import BadRows
from ..polars_module import pl
from .delimited_form import is_utf8
from .encodings import checked_encoding
from .headers import check_columns
from .separators import separator_of
from .text_stream import encoding_hint, open_text

BLOCK_BYTES = 4 << 20


class HistoryLines:
    """A text of lines such as "u1 a b c": a row a user, whose last column is the rest of the line."""

    unit = "line"
    names_may_be_data = False

    def __init__(self, path: Path, separator: str, columns: Sequence[str], encoding: str | None = None) -> None:
        """Take the names of two columns. Raises InputError if there is no such file, and for other columns."""
        refuse_irregular(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        self.path = path
        self.columns = check_columns(columns)
        if len(self.columns) != 2:
            raise InputError(f"{path}: --columns: expected user,item for lines of a user and items, found {columns}")
        self._separator = separator_of(separator).decode()
        self._encoding = None if encoding is None else checked_encoding(encoding)

    def batches(
        self, columns: Mapping[str, str], bad_rows: BadRows, is_row: Callable[[Mapping[str, bytes]], bool] | None = None
    ) -> Iterator[pl.DataFrame]:
        """Yield the given columns ({new name: name in the file}), and each row's line as `place`. is_row: not used.

        Lines that are not UTF-8 are added to `bad_rows`, as are empty ones. Raises InputError as `bad_rows` says, and
        if the file cannot be read.
        """
        names = dict(zip(self.columns, ("field_0", "field_1")))
        blank: list[int] = []  # lines that are empty, unless the text ends with them
        first_line = 1
        for block in self._blocks():
            rows: list[tuple[int, str]] = []
            lines = block.split(b"\n")
            for number, line in enumerate(lines, start=first_line):
                if not line.strip():
                    blank.append(number)
                    continue
                if blank:
                    bad_rows.add("empty line", blank, "expected a user and items, found an empty line")
                    blank = []
                if is_utf8(line):
                    rows.append((number, line.decode()))
                else:
                    bad_rows.add("not UTF-8", [number], "not UTF-8", self._encoding_hint)
            first_line += len(lines)
            frame = pl.DataFrame(rows, {"place": pl.Int64, "line": pl.String}, orient="row")
            pieces = pl.col("line").str.strip_chars(" \r").str.splitn(self._separator, 2)
            split = frame.select(pieces.alias("pieces"), "place").unnest("pieces")
            yield split.select(*(pl.col(names[column]).alias(name) for name, column in columns.items()), "place")

    def _encoding_hint(self) -> str:
        """Return what to do about a line that is not UTF-8."""
        return encoding_hint(self.path, "correct it, or leave out such rows with --bad-rows skip")

    def _blocks(self) -> Iterator[bytes]:
        """Yield whole lines, some megabytes at a time, without the last line end. Raises InputError as `open_text`."""
        rest = b""
        with open_text(self.path, self._encoding) as text:
            while block := text.read(BLOCK_BYTES):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                if newline:
                    yield whole
        if rest:
            yield rest
