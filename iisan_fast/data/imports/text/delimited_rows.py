"""Find the rows of delimited text one by one, independently of the parser that reads their fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..bad_rows import BadRows
from .delimited_blocks import is_row, may_be_row, regular_rows
from .delimited_form import (
    BLANK,
    FIELD_END,
    MAX_ROW_BYTES,
    ROW_END,
    WITHOUT_ENDS,
    Form,
    Unfinished,
    UnfitRow,
    WholeRows,
    escaped_row,
    next_row,
)
from .encodings import undecoded

SHOWN = 60  # characters of a bad row in a message
LOOKED_AT = 64 << 10  # bytes from the first quote on that say if quotes enclose fields


def checked_rows(
    content: bytes,
    form: Form,
    first_line: int,
    at_end: bool,
    bad_rows: BadRows,
    encoding_hint: Callable[[], str] | None = None,
) -> WholeRows:
    """Return the whole rows at the start of a text that fit, one by one, and add the others to `bad_rows`.

    After a row that does not fit, the next line is a row again. at_end: the text ends here, with a line end.
    encoding_hint: says what to do about bytes of another encoding. Raises InputError as `bad_rows` says.
    """
    start = 0
    line = first_line
    fit: list[bytes] = []
    lines: list[int] = []
    blank_end = len(content.rstrip(BLANK))
    while start < blank_end:
        end = content.find(b"\n", start, start + MAX_ROW_BYTES) + 1
        if not end:
            break
        try:
            fields, row_end = _next_row(content, start, form)
            _refuse_swallowed_rows(content[start:row_end], form, line)
            end = row_end
            _check_row(content[start:row_end], fields, form)
        except Unfinished:
            if not at_end and len(content) - start < MAX_ROW_BYTES:
                break
            bad_rows.add("stray quote", [line], f"a quoted field does not end{_beginning(content, start)}")
        except UnfitRow as unfit:
            if unfit.kind.startswith("not "):
                bad_rows.add(unfit.kind, [line], str(unfit), encoding_hint)
            else:
                bad_rows.add(unfit.kind, [line], f"{unfit}{_beginning(content, start)}")
        else:
            fit.append(FIELD_END.join(field.translate(WITHOUT_ENDS) for field in fields) + ROW_END)
            lines.append(line)
        line += content.count(b"\n", start, end)
        start = end
    return WholeRows(b"".join(fit), FIELD_END, ROW_END, np.array(lines, np.int64), start)


def _next_row(content: bytes, start: int, form: Form) -> tuple[list[bytes], int]:
    """Return what `next_row` returns, also for quotes after a backslash. Raises UnfitRow and Unfinished as it does."""
    try:
        return next_row(content, start, form)
    except (UnfitRow, Unfinished):
        escaped = escaped_row(content, start, form)
        if escaped is None:
            raise
        return escaped


def quotes_enclose_fields(content: bytes, form: Form) -> bool:
    """Return False if more rows fit where quotes are characters like any other. content: it starts with a row."""
    first = content.index(b'"')
    start = content.rfind(b"\n", 0, first) + 1
    sample = content[start : first + LOOKED_AT]
    sample = sample[: sample.rfind(b"\n") + 1]
    as_quotes, as_characters = (form._replace(quoted=quoted) for quoted in (True, False))
    rows = regular_rows(sample, as_quotes, 1)
    if rows is not None and not sample[rows.used :].strip(BLANK):
        return True
    return _unfit_rows(sample, as_quotes) <= _unfit_rows(sample, as_characters)


def _unfit_rows(content: bytes, form: Form) -> int:
    """Return the number of rows that do not fit a form."""
    bad_rows = BadRows(Path(), "skip", "line")
    checked_rows(content, form, 1, True, bad_rows)
    return bad_rows.count


def _refuse_swallowed_rows(row: bytes, form: Form, line: int) -> None:
    """Raise UnfitRow if the first line of a row may be one, and another line is one, so that a quote may be missing.

    line: the number of the first line.
    """
    first, *others = row.removesuffix(b"\n").split(b"\n")
    if not others or not may_be_row(first, form):
        return
    for number, text in enumerate(others, start=line + 1):
        if is_row(text, form):
            raise UnfitRow(
                "stray quote", f"a quoted field goes on to line {number}, which is a row; is a quote missing?"
            )


def _check_row(row: bytes, fields: list[bytes], form: Form) -> None:
    """Raise UnfitRow for bytes that are not in the file's encoding, and for another number of fields."""
    problem = undecoded(row, form.encoding)
    if problem is not None:
        raise UnfitRow(f"not {form.encoding}", problem)
    if row.strip(BLANK) == b"":
        raise UnfitRow("empty line", f"expected {form.fields} fields, found an empty line")
    if len(fields) != form.fields:
        raise UnfitRow("wrong number of fields", f"expected {form.fields} fields, found {len(fields)}")


def _beginning(content: bytes, start: int) -> str:
    """Return the beginning of the line at `start` for a message, control characters as escapes."""
    if content.startswith((b"\n", b"\r\n"), start):
        return ""
    end = content.find(b"\n", start, start + 4 * SHOWN)
    text = content[start : end if end >= 0 else start + 4 * SHOWN].decode(errors="replace").rstrip("\r")
    return f" in {text[:SHOWN]!r}{'…' if len(text) > SHOWN or end < 0 else ''}"
