"""Find what stands between the fields of a text, and read the separator that a user gives."""

from __future__ import annotations

import re

from ....errors import InputError
from .delimited_form import BLANK, SPACE, Form, Unfinished, UnfitRow, next_row, split_line

NAMES = {
    "comma": ",",
    "tab": "\t",
    "semicolon": ";",
    "bar": "|",
    "pipe": "|",
    "colon": ":",
    "space": " ",
    "spaces": " ",
    r"\s+": " ",
}
WORDS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars", "::": "double colons", " ": "spaces"}
LOOKED_FOR = (b"\t", b",", b";", b"|", b"::")
QUOTING = (b",", b";")  # between fields that quotes may enclose; with others, the text says if they do
ROWS = 200  # that are looked at
PLAIN = 0.8  # the least share of rows with as many fields as the first one has
ESCAPE = re.compile(r"\\(?:t|x([0-9a-fA-F]{2}))")
ADVICE = "name it with --separator: comma, tab, semicolon, bar, space or the characters themselves"


def separator_of(text: str) -> bytes:
    r"""Return the separator that a user's text means: a name such as "tab", an escape such as \t, or the characters.

    Spaces beside it are no part of it, since they are no part of a field either. Raises InputError for a separator
    that cannot be one.
    """
    plain = ESCAPE.sub(lambda escape: chr(int(escape[1] or "09", 16)), NAMES.get(text.lower(), text))
    separator = plain.strip(" ") or plain[:1]
    if not separator or re.search(r'[\r\n"\w.]', separator):
        words = "comma, tab, semicolon, bar, space, or characters that are no letters, digits, points or quotes"
        raise InputError(f"--separator: expected {words}, found {text!r}")
    return separator.encode()


def shown_separator(separator: bytes) -> str:
    """Return a separator's name in messages, in the plural."""
    text = separator.decode()
    return WORDS.get(text, repr(text))


def find_separator(sample: bytes, fields: int | None = None) -> bytes | None:
    """Return the separator of a text, None if it is not plain. An empty text has commas.

    sample: whole rows, with the header if there is one. fields: the number in each row, if it is known.
    """
    counts = {separator: _field_counts(sample, separator) for separator in LOOKED_FOR}
    if not any(counts.values()):
        return b","
    candidates = [separator for separator, numbers in counts.items() if numbers[0] > 1]
    if fields is not None:
        candidates = [at for at in candidates if _share(counts[at], fields) >= PLAIN] or candidates
    if len(candidates) > 1:
        shares = {separator: _share(counts[separator], counts[separator][0]) for separator in candidates}
        best = max(shares.values())
        candidates = [separator for separator, share in shares.items() if share == best and best >= PLAIN]
    if not candidates:
        return SPACE if _has_spaces_between(sample, fields) else None
    return candidates[0] if len(candidates) == 1 else None


def _has_spaces_between(sample: bytes, fields: int | None) -> bool:
    """Return True if nearly all rows have as many words, and the header as many, or one more or less for an index."""
    first, *others = _field_counts(sample, SPACE)
    if first == 1:
        return False
    if not others:
        return first == fields
    words = max(others, key=others.count)
    return abs(first - words) <= 1 and _share(others, words) >= PLAIN


def sample_rows(sample: bytes, separator: bytes) -> list[list[bytes]]:
    """Return the fields of each of the first rows that are not empty; a row whose quotes do not fit is one line."""
    form = Form(separator, True, 0)
    rows: list[list[bytes]] = []
    start = 0
    while len(rows) < ROWS and (end := sample.find(b"\n", start) + 1):
        line = sample[start:end]
        try:
            fields, end = next_row(sample, start, form)
        except (UnfitRow, Unfinished):
            fields = split_line(line, separator)
        if line.strip(BLANK):
            rows.append(fields)
        start = end
    return rows


def _field_counts(sample: bytes, separator: bytes) -> list[int]:
    """Return the number of fields of each of the first rows."""
    return [len(fields) for fields in sample_rows(sample, separator)]


def _share(counts: list[int], fields: int) -> float:
    """Return the share of rows with this number of fields."""
    return counts.count(fields) / len(counts)
