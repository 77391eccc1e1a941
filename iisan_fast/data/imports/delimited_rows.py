"""Find the rows of delimited text by the rules of RFC 4180, independently of the parser that reads their fields.

A field without quotes holds no quote. A field with quotes holds separators, line ends and doubled quotes, and ends with
a quote. A line ends with a newline, or with a carriage return and a newline. All rows have the same number of fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from .bad_rows import BadRows

MAX_ROW_BYTES = 16 << 20
QUOTE, NEWLINE, RETURN = b'"\n\r'
FIELD_END, ROW_END = b"\x1f", b"\x1e"  # the unit and record separators of ASCII
WITHOUT_ENDS = bytes.maketrans(FIELD_END + ROW_END + b"\r", b"   ")  # polars leaves out a return at the end of a row
SHOWN = 60  # characters of a bad row in a message


class Form(NamedTuple):
    """The form of delimited text."""

    separator: bytes
    quoted: bool  # False: a quote is a character like any other
    fields: int  # in each row
    is_row: Callable[[list[bytes]], bool] | None = None  # True for fields that can hardly be a part of a quoted field


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


def regular_rows(content: bytes, form: Form, first_line: int) -> WholeRows | None:
    """Return the whole rows at the start of a text, or None if one may not fit. Blank lines at the end are not used.

    content: it starts with a row. first_line: the number of its first line.
    """
    if form.quoted and b'"' in content:
        return _quoted_rows(content, form, first_line)
    codes = np.frombuffer(content, np.uint8)
    newlines = np.flatnonzero(codes == NEWLINE)
    newlines = newlines[: _rows_before_blank_end(content, newlines)]
    used = int(newlines[-1]) + 1 if len(newlines) else 0
    rows = content[:used]
    separators = np.flatnonzero(codes[:used] == form.separator[0])
    if not _all_fit(separators, newlines, form.fields) or not _is_utf8(rows):
        return None
    if b"\r" in rows:
        if rows.count(b"\r") != rows.count(b"\r\n"):
            return None
        rows = rows.replace(b"\r\n", b"\n")
    return WholeRows(rows, form.separator, b"\n", first_line + np.arange(len(newlines)), used)


def checked_rows(content: bytes, form: Form, first_line: int, at_end: bool, bad_rows: BadRows) -> WholeRows:
    """Return the whole rows at the start of a text that fit, one by one, and add the others to `bad_rows`.

    After a row that does not fit, the next line is a row again. at_end: the text ends here, with a line end. Raises
    InputError as `bad_rows` says.
    """
    start = 0
    line = first_line
    fit: list[bytes] = []
    lines: list[int] = []
    blank_end = len(content.rstrip(b"\r\n"))
    while start < blank_end:
        end = content.find(b"\n", start, start + MAX_ROW_BYTES) + 1
        if not end:
            break
        try:
            fields, row_end = next_row(content, start, form)
            _refuse_swallowed_rows(content[start:row_end], form, line)
            end = row_end
            _check_row(content[start:row_end], fields, form)
        except Unfinished:
            if not at_end and len(content) - start < MAX_ROW_BYTES:
                break
            bad_rows.add("stray quote", [line], f"a quoted field does not end{_beginning(content, start)}")
        except UnfitRow as unfit:
            bad_rows.add(unfit.kind, [line], f"{unfit}{_beginning(content, start)}")
        else:
            fit.append(FIELD_END.join(field.translate(WITHOUT_ENDS) for field in fields) + ROW_END)
            lines.append(line)
        line += content.count(b"\n", start, end)
        start = end
    return WholeRows(b"".join(fit), FIELD_END, ROW_END, np.array(lines, np.int64), start)


def next_row(content: bytes, start: int, form: Form) -> tuple[list[bytes], int]:
    """Return the fields of the row at `start`, and the place behind its line end.

    Raises UnfitRow for a quote or a carriage return that does not fit, and Unfinished if the text ends within the row.
    """
    pattern = _field_pattern(form.separator, form.quoted)
    fields: list[bytes] = []
    while match := pattern.match(content, start):
        quoted, plain, end = match.groups()
        fields.append(plain if quoted is None else quoted.replace(b'""', b'"'))
        start = match.end()
        if end != form.separator:
            return fields, start
    if form.quoted and content.startswith(b'"', start):
        closing = _closing_quote(content, start)
        if closing < 0 or content[closing + 1 : closing + 3] in (b"", b"\r"):
            raise Unfinished
        raise UnfitRow("stray quote", "text after the closing quote of a field")
    odd = re.compile(rb'["\r]' if form.quoted else rb"\r").search(content, start)
    if odd is None or odd.end() == len(content):
        raise Unfinished
    if odd[0] == b'"':
        raise UnfitRow("stray quote", "a quote inside a field that does not start with one")
    raise UnfitRow("carriage return", "a carriage return inside a field; lines end with \\n or \\r\\n")


def _quoted_rows(content: bytes, form: Form, first_line: int) -> WholeRows | None:
    """Return what `regular_rows` returns for a text with quotes."""
    codes = np.frombuffer(content, np.uint8)
    is_quote = codes == QUOTE
    inside = np.cumsum(is_quote, dtype=np.uint8) & 1  # a closing quote counts as outside
    all_newlines = np.flatnonzero(codes == NEWLINE)
    newlines = all_newlines[inside[all_newlines] == 0]
    newlines = newlines[: _rows_before_blank_end(content, newlines)]
    used = int(newlines[-1]) + 1 if len(newlines) else 0
    codes = codes[:used]
    all_separators = np.flatnonzero(codes == form.separator[0])
    separators = all_separators[inside[all_separators] == 0]
    quotes = np.flatnonzero(is_quote[:used])
    returns = np.flatnonzero((codes == RETURN) & (inside[:used] == 0))
    fits = (
        _quotes_fit(codes, quotes, form.separator[0])
        and (codes[returns + 1] == NEWLINE).all()
        and _all_fit(separators, newlines, form.fields)
        and _is_utf8(content[:used])
    )
    all_newlines = all_newlines[: np.searchsorted(all_newlines, used)]
    if not fits or _swallows_rows(content, all_newlines, all_separators, newlines, form):
        return None
    starts = np.concatenate([[0], newlines + 1])[:-1]
    out = np.frombuffer(content[:used].translate(WITHOUT_ENDS), np.uint8).copy()
    out[separators] = FIELD_END[0]
    out[newlines] = ROW_END[0]
    keep = np.ones(used, bool)
    keep[returns] = False
    keep[quotes[1::2]] = False
    keep[quotes[::2][np.diff(quotes, prepend=-2)[::2] != 1]] = False  # of two doubled quotes the second stays
    lines = first_line + np.searchsorted(all_newlines, starts)
    return WholeRows(out[keep].tobytes(), FIELD_END, ROW_END, lines, used)


def _quotes_fit(codes: np.ndarray, quotes: np.ndarray, separator: int) -> bool:
    """Return True if each quote opens or closes a field, or is doubled. codes: whole rows, which end with a newline."""
    opening, closing = quotes[::2], quotes[1::2]
    before = np.where(opening > 0, codes[opening - 1], NEWLINE)
    opens = (before == separator) | (before == NEWLINE) | (np.diff(quotes, prepend=-2)[::2] == 1)
    after = codes[closing + 1]
    return bool(opens.all() and np.isin(after, (separator, NEWLINE, RETURN, QUOTE)).all())


def _swallows_rows(
    content: bytes, all_newlines: np.ndarray, all_separators: np.ndarray, newlines: np.ndarray, form: Form
) -> bool:
    """Return True if `_refuse_swallowed_rows` may refuse a row."""
    if form.is_row is None or len(all_newlines) == len(newlines):
        return False
    counts = np.diff(np.searchsorted(all_separators, all_newlines), prepend=0)
    within = ~np.isin(np.concatenate([[-1], all_newlines[:-1]]), np.concatenate([[-1], newlines]))
    starts = np.flatnonzero(~within)
    for line in np.flatnonzero(within & (counts == form.fields - 1)):
        first = starts[np.searchsorted(starts, line) - 1]
        before, inner = (content[all_newlines[at - 1] + 1 if at else 0 : all_newlines[at]] for at in (first, line))
        if _may_be_row(before, form) and _is_row(inner, form):
            return True
    return False


def _refuse_swallowed_rows(row: bytes, form: Form, line: int) -> None:
    """Raise UnfitRow if the first line of a row may be one, and another line is one, so that a quote may be missing.

    line: the number of the first line.
    """
    first, *others = row.removesuffix(b"\n").split(b"\n")
    if not others or not _may_be_row(first, form):
        return
    for number, text in enumerate(others, start=line + 1):
        if _is_row(text, form):
            raise UnfitRow(
                "stray quote", f"a quoted field goes on to line {number}, which is a row; is a quote missing?"
            )


def _check_row(row: bytes, fields: list[bytes], form: Form) -> None:
    """Raise UnfitRow for another number of fields, and for bytes that are not UTF-8."""
    if row.strip(b"\r\n") == b"":
        raise UnfitRow("empty line", f"expected {form.fields} fields, found an empty line")
    if len(fields) != form.fields:
        raise UnfitRow("wrong number of fields", f"expected {form.fields} fields, found {len(fields)}")
    if not _is_utf8(row):
        raise UnfitRow("not UTF-8", "not UTF-8; save the file as UTF-8")


def _is_row(text: bytes, form: Form) -> bool:
    """Return True if a line is a row by itself, as far as the form can say."""
    fields = text.removesuffix(b"\r").split(form.separator)
    return len(fields) == form.fields and form.is_row is not None and form.is_row(fields)


def _may_be_row(text: bytes, form: Form) -> bool:
    """Return True if a line is a row by itself, or one with separators in a field whose quote is missing."""
    return text.count(form.separator) >= form.fields or _is_row(text, form)


def _rows_before_blank_end(content: bytes, newlines: np.ndarray) -> int:
    """Return the number of rows without the blank lines at the end. newlines: the places of the rows' line ends."""
    end = len(content.rstrip(b"\r\n"))
    return int(np.searchsorted(newlines, end)) + 1 if end else 0


def _all_fit(separators: np.ndarray, newlines: np.ndarray, fields: int) -> bool:
    """Return True if each row has `fields` fields. separators, newlines: places outside of quotes."""
    counts = np.diff(np.searchsorted(separators, newlines), prepend=0)
    return bool((counts == fields - 1).all())


def _is_utf8(content: bytes) -> bool:
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
    end = rb"(" + mark + rb"|\r?\n)"
    if not quoted:
        return re.compile(rb"(?!)()|([^\r\n" + mark + rb"]*)" + end)
    return re.compile(rb'(?:"([^"]*(?:""[^"]*)*)"|([^"\r\n' + mark + rb"]*))" + end)


def _closing_quote(content: bytes, start: int) -> int:
    """Return the place of the quote that closes the one at `start`, -1 if there is none."""
    place = content.find(b'"', start + 1)
    while place >= 0 and content[place + 1 : place + 2] == b'"':
        place = content.find(b'"', place + 2)
    return place


def _beginning(content: bytes, start: int) -> str:
    """Return the beginning of the line at `start` for a message, control characters as escapes."""
    if content.startswith((b"\n", b"\r\n"), start):
        return ""
    end = content.find(b"\n", start, start + 4 * SHOWN)
    text = content[start : end if end >= 0 else start + 4 * SHOWN].decode(errors="replace").rstrip("\r")
    return f" in {text[:SHOWN]!r}{'…' if len(text) > SHOWN or end < 0 else ''}"
