"""Parse JSON objects that a program has recorded, and trust nothing in them: a mistake is one line with its place."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

from .errors import InputError

MOST_JSON_BYTES = 16 << 20  # no recorded object is near; parsing takes up to twenty times as much memory
MOST_LEVELS = 50  # of objects and lists in each other
MOST_DIGITS = 40  # of a whole number: the states of random generators have up to 39


def parse_json_object(content: str | bytes, where: object) -> dict[str, Any]:
    """Return the JSON object that a text, or its UTF-8 bytes, holds.

    where: what the text belongs to, the first words of an error: the path of a file.

    Raises InputError, in one line, unless the text is one JSON object: for another value, a name that stands twice in
    an object, numbers that are not finite or have more than MOST_DIGITS digits, text that is not Unicode, more than
    MOST_LEVELS levels, or more than MOST_JSON_BYTES bytes.
    """
    if len(content) > MOST_JSON_BYTES:
        raise InputError(f"{where}: expected at most {MOST_JSON_BYTES} bytes of JSON, found {len(content)}")
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        values = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: expected JSON in UTF-8, found other bytes at {error.start}") from None
    except RecursionError:
        raise InputError(f"{where}: not valid JSON (more than {MOST_LEVELS} levels)") from None
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        kind = "null" if values is None else type(values).__name__
        raise InputError(f"{where}: expected a JSON object, found {kind}")
    _check_parts(values, where)
    return values


def distinct_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of names and values, as a hook of `json`. Raises ValueError if a name stands twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{json.dumps(twice)[:60]} stands twice in an object")
    return values


def _check_parts(values: dict[str, Any], where: object) -> None:
    """Raise InputError if the values nest too deep or hold text that is not Unicode."""
    level: list[Any] = [values]
    for _ in range(MOST_LEVELS):
        texts = [part for part in level if isinstance(part, str)]
        texts += [name for part in level if isinstance(part, dict) for name in part]
        for text in texts:
            _check_text(text, where)
        level = [
            inner
            for part in level
            if isinstance(part, (dict, list))
            for inner in (part.values() if isinstance(part, dict) else part)
        ]
    if level:
        raise InputError(f"{where}: not valid JSON (more than {MOST_LEVELS} levels)")


def _check_text(text: str, where: object) -> None:
    """Raise InputError for half of a surrogate pair. Bytes of file names that are no UTF-8 are admitted."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InputError(f"{where}: not valid JSON (text that is not Unicode: {json.dumps(text)[:60]})") from None


def _whole_number(digits: str) -> int:
    """Return a whole number. Raises ValueError if it has too many digits."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    """Return a number. Raises ValueError if it is too large."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:60]} is too large")
    return value


def _no_number(name: str) -> NoReturn:
    """Raise ValueError: NaN and Infinity are not JSON."""
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=distinct_names, parse_int=_whole_number, parse_float=_number, parse_constant=_no_number
)


def is_finite_number(value: Any) -> bool:
    """Return True for a finite number as JSON has it; True and False are none."""
    return type(value) in (int, float) and math.isfinite(value)
