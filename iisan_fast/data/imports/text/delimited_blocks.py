"""Find the rows of a block of delimited text all at once, if each fits the form."""

from __future__ import annotations

import re

import numpy as np

from .delimited_form import BLANK, FIELD_END, ROW_END, SPACE, WITHOUT_ENDS, Form, WholeRows, is_utf8, split_line

QUOTE, NEWLINE, RETURN = b'"\n\r'
SPACES_AT_ENDS = re.compile(rb"^ +| +(?=\r?$)", re.MULTILINE)
SPACES = re.compile(rb" {2,}")


def regular_rows(content: bytes, form: Form, first_line: int) -> WholeRows | None:
    """Return the whole rows at the start of a text, or None if one may not fit. Blank lines at the end are not used.

    content: it starts with a row. first_line: the number of its first line.
    """
    one_byte = len(form.separator) == 1 and form.separator != SPACE
    if form.quoted and b'"' in content:
        return _quoted_rows(content, form, first_line) if one_byte else None
    used = _end_of_rows(content)
    rows = content[:used]
    separator = form.separator
    if separator == SPACE:
        rows = _single_spaces(rows)
    elif not one_byte:
        rows = rows.replace(FIELD_END, SPACE).replace(separator, FIELD_END)
        separator = FIELD_END
    codes = np.frombuffer(rows, np.uint8)
    newlines = np.flatnonzero(codes == NEWLINE)
    separators = np.flatnonzero(codes == separator[0])
    if not _all_fit(separators, newlines, form.fields) or not is_utf8(rows):
        return None
    if b"\r" in rows:
        if rows.count(b"\r") != rows.count(b"\r\n"):
            return None
        rows = rows.replace(b"\r\n", b"\n")
    return WholeRows(rows, separator, b"\n", first_line + np.arange(len(newlines)), used)


def is_row(text: bytes, form: Form) -> bool:
    """Return True if a line is a row by itself, as far as the form can say."""
    fields = split_line(text, form.separator)
    return len(fields) == form.fields and form.is_row is not None and form.is_row(fields)


def may_be_row(text: bytes, form: Form) -> bool:
    """Return True if a line is a row by itself, or one with separators in a field whose quote is missing."""
    return len(split_line(text, form.separator)) > form.fields or is_row(text, form)


def _quoted_rows(content: bytes, form: Form, first_line: int) -> WholeRows | None:
    """Return what `regular_rows` returns for a text with quotes and a separator of one byte."""
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
        and is_utf8(content[:used])
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
    """Return True if a quoted field may go on over whole rows, so that a quote may be missing."""
    if form.is_row is None or len(all_newlines) == len(newlines):
        return False
    counts = np.diff(np.searchsorted(all_separators, all_newlines), prepend=0)
    within = ~np.isin(np.concatenate([[-1], all_newlines[:-1]]), np.concatenate([[-1], newlines]))
    starts = np.flatnonzero(~within)
    for line in np.flatnonzero(within & (counts == form.fields - 1)):
        first = starts[np.searchsorted(starts, line) - 1]
        before, inner = (content[all_newlines[at - 1] + 1 if at else 0 : all_newlines[at]] for at in (first, line))
        if may_be_row(before, form) and is_row(inner, form):
            return True
    return False


def _single_spaces(rows: bytes) -> bytes:
    """Return rows with one space where there are more, and none at the ends of lines."""
    if rows.startswith(SPACE) or any(spaces in rows for spaces in (b"  ", b" \n", b"\n ", b" \r")):
        return SPACES.sub(SPACE, SPACES_AT_ENDS.sub(b"", rows))
    return rows


def _end_of_rows(content: bytes) -> int:
    """Return the place behind the line end of the last row; blank lines at the end are no rows."""
    end = len(content.rstrip(BLANK))
    behind = content.find(b"\n", end) + 1
    return (behind or content.rfind(b"\n", 0, end) + 1) if end else 0


def _rows_before_blank_end(content: bytes, newlines: np.ndarray) -> int:
    """Return the number of rows without the blank lines at the end. newlines: the places of the rows' line ends."""
    end = len(content.rstrip(BLANK))
    return int(np.searchsorted(newlines, end)) + 1 if end else 0


def _all_fit(separators: np.ndarray, newlines: np.ndarray, fields: int) -> bool:
    """Return True if each row has `fields` fields. separators, newlines: places outside of quotes."""
    counts = np.diff(np.searchsorted(separators, newlines), prepend=0)
    return bool((counts == fields - 1).all())
