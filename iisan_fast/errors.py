"""The one exception for bad input: a single line saying what, where, expected, found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from itertools import islice


class InputError(Exception):
    """Input that cannot be used. The command line prints its message as one line and exits with code 2."""


def first_few(names: Iterable[object], total: int, limit: int = 3) -> str:
    """`a, b, c and 9 more` for the first `limit` of `total` names."""
    shown = ", ".join(str(name) for name in islice(names, limit))
    return f"{shown} and {total - limit} more" if total > limit else shown


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise InputError unless a setting's value is one of the `allowed` words."""
    if value not in allowed:
        raise InputError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")


def check_range(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    """Raise InputError unless a setting's value is a whole number from `minimum` to `maximum`; None: without an end."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name}: expected a whole number, found {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        expected = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
        raise InputError(f"{name}: expected {expected}, found {value}")


def nearest(name: str, names: Collection[str]) -> str:
    """Return "did you mean …?" with the names that are spelled like `name`, or a list of all names."""
    similar = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(similar)}?" if similar else f"expected one of {', '.join(names)}"
