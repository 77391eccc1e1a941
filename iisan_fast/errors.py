"""The one exception for bad input: a single line saying what, where, expected, found and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice


class InputError(Exception):
    """Input that cannot be used. The command line prints its message as one line and exits with code 2."""


def first_few(names: Iterable[object], total: int, limit: int = 3) -> str:
    """`a, b, c and 9 more` for the first `limit` of `total` names."""
    shown = ", ".join(str(name) for name in islice(names, limit))
    return f"{shown} and {total - limit} more" if total > limit else shown
