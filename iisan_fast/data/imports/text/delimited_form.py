"""Define the form of delimited text, and split one row of it into fields.

A field with quotes holds separators, line ends and doubled quotes, and ends with a quote; spaces may stand around the
quotes. A field without quotes holds no quote if the form is quoted. A line ends with a newline, or with a carriage
return and a newline. All rows have the same number of fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

MAX_ROW_BYTES = 16 << 20
SPACE = b" "  # as a separator it stands for one space or more; those at the ends of a line are no separators
FIELD_END, ROW_END = b"\x1f", b"\x1e"  # the unit and record separators of ASCII
WITHOUT_ENDS = bytes.maketrans(FIELD_END + ROW_END + b"\r", b"   ")  # polars leaves out a return at the end of a row
BLANK = b"\r\n "  # a line of these is empty
UTF_8 = "UTF-8"
ESCAPED_QUOTE = re.compile(rb'(?<!\\)((?:\\\\)*)\\"')


class Form(NamedTuple):
    """The form of delimited text in UTF-8."""

    separator: bytes
    quoted: bool | None  # False: a quote is a character like any other; None: not known, and no quote has come yet
    fields: int  # in each row
    is_row: Callable[[list[bytes]], bool] | None = None  # True for fields that can hardly be a part of a quoted field
    encoding: str = UTF_8  # of the file that was decoded; bytes that do not fit it are no UTF-8 in the text


class WholeRows(NamedTuple):
    """Whole rows, their fields without quotes."""

    content: bytes
    separator: bytes
    row_end: bytes
    lines: np.ndarray  # int64 [rows]: the line on which each row starts
    used: int  # bytes of the input, bad rows included


class UnfitRow(Exception):
    """A row that does not fit the form: its kind and its problem."""

    def __init__(self, kind: str, problem: str) -> None:
        """Take the kind, by which rows are counted, and the problem with all details."""
        super().__init__(problem)
        self.kind = kind


class Unfinished(Exception):
    """The text ends within a row."""


def next_row(content: bytes, start: int, form: Form) -> tuple[list[bytes], int]:
    """Return the fields of the row at `start`, and the place behind its line end.

    Raises UnfitRow for a quote or a carriage return that does not fit, and Unfinished if the text ends within the row.
    """
    pattern = _field_pattern(form.separator, form.quoted)
    fields: list[bytes] = []
    while form.separator == SPACE and content.startswith(SPACE, start):
        start += 1
    while match := pattern.match(content, start):
        quoted, plain, end = match.groups()
        fields.append(plain if quoted is None else quoted.replace(b'""', b'"'))
        start = match.end()
        if end.endswith(b"\n"):
            return fields, start
    quote = _opening_quote(content, start)
    if form.quoted and quote >= 0:
        closing = _closing_quote(content, quote)
        if closing < 0 or content[closing + 1 : closing + 3] in (b"", b"\r"):
            raise Unfinished
        raise UnfitRow("stray quote", "text after the closing quote of a field")
    odd = re.compile(rb'["\r]' if form.quoted else rb"\r").search(content, start)
    if odd is None or odd.end() == len(content):
        raise Unfinished
    if odd[0] == b'"':
        raise UnfitRow("stray quote", "a quote inside a field that does not start with one")
    raise UnfitRow("carriage return", "a carriage return inside a field; lines end with \\n or \\r\\n")


def escaped_row(content: bytes, start: int, form: Form) -> tuple[list[bytes], int] | None:
    r"""Return what `next_row` returns for a line whose quotes are written as \", as MySQL does; None for others."""
    end = content.find(b"\n", start) + 1
    line = content[start:end]
    if not form.quoted or b'\\"' not in line:
        return None
    try:
        fields, length = next_row(ESCAPED_QUOTE.sub(rb'\1""', line), 0, form)
    except (UnfitRow, Unfinished):
        return None
    return (fields, end) if len(fields) == form.fields and length else None


def split_line(text: bytes, separator: bytes) -> list[bytes]:
    """Return the fields of a line whose quotes are characters like any other."""
    line = text.removesuffix(b"\n").removesuffix(b"\r")
    return re.split(rb" +", line.strip(SPACE)) if separator == SPACE else line.split(separator)


def is_utf8(content: bytes) -> bool:
    """Return True if bytes are UTF-8."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


@cache
def _field_pattern(separator: bytes, quoted: bool) -> re.Pattern[bytes]:
    """Return the pattern of a field and what ends it. Groups: the text in quotes, the text without, the end."""
    mark = re.escape(separator)
    no_quote = b'"' if quoted else b""
    if separator == SPACE:
        padding = b""
        end = rb"( +(?=[^ \r\n])| *\r?\n)"
    else:
        padding = b" *"
        end = rb"(" + mark + rb"|\r?\n)"
    if len(separator) == 1:
        plain = rb"([^\r\n" + no_quote + mark + rb"]*)"
    else:
        plain = rb"((?:(?!" + mark + rb")[^\r\n" + no_quote + rb"])*)"
    in_quotes = padding + rb'"([^"]*(?:""[^"]*)*)"' + padding if quoted else rb"(?!)()"
    return re.compile(rb"(?:" + in_quotes + rb"|" + plain + rb")" + end)


def _opening_quote(content: bytes, start: int) -> int:
    """Return the place of the quote at `start` or behind spaces there, -1 if there is none."""
    while content.startswith(SPACE, start):
        start += 1
    return start if content.startswith(b'"', start) else -1


def _closing_quote(content: bytes, start: int) -> int:
    """Return the place of the quote that closes the one at `start`, -1 if there is none."""
    place = content.find(b'"', start + 1)
    while place >= 0 and content[place + 1 : place + 2] == b'"':
        place = content.find(b'"', place + 2)
    return place
