"""Read tables of tab-separated text line by line. Every mistake is an error that names file and line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from ..files import refuse_irregular

MAX_ID_BYTES = 4096  # of an id in UTF-8; tables of ids are as wide as the longest
CONTROL_CHARACTERS = r"[\x00-\x1f\x7f-\x9f]"  # as a regular expression
CONTROLS = re.compile(CONTROL_CHARACTERS)
BesideUser = TypeVar("BesideUser", bound=tuple[str, Any])


def read_table(path: Path, columns: int, may_end_blank: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, fields) of a UTF-8 file with `columns` fields a line, tabs between, none blank.

    may_end_blank: the last field of a line may be blank. A byte order mark, \\r\\n endings and a missing last newline
    are accepted. Raises InputError, with file and line, for anything else: no file, no line, an empty line or field, a
    wrong number of fields, bytes that are not UTF-8, and an id that `refuse_unfit_id` refuses in the first field.
    """
    refuse_irregular(path)
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, _fields(line, columns, f"{path} line {number}", number == 1, may_end_blank)
    except FileNotFoundError:
        problem = (
            f"a link to {os.readlink(path)}, which is not there; restore it" if path.is_symlink() else "no such file"
        )
        raise InputError(f"{path}: {problem}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not number:
        raise InputError(f"{path}: empty; expected lines of {_form(columns)}")


def _fields(line: bytes, columns: int, where: str, first: bool, may_end_blank: bool) -> list[str]:
    """Split a line into its fields. Raises InputError, naming `where`.

    first: it may start with a byte order mark. may_end_blank: its last field may be blank.
    """
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (at byte {error.start + 1}); save the file as UTF-8") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise InputError(f"{where}: empty line; expected {_form(columns)}")
    fields = text.split("\t")
    if len(fields) != columns:
        raise InputError(f"{where}: expected {_form(columns)}, found {len(fields)}")
    for position, field in enumerate(fields, start=1):
        if not field.strip() and not (may_end_blank and position == columns):
            raise InputError(f"{where}: field {position} of {columns} is empty")
    refuse_unfit_id(fields[0], where)
    return fields


def _form(columns: int) -> str:
    """Return the form of a line in words."""
    return "1 field" if columns == 1 else f"{columns} fields separated by tabs"


def refuse_unfit_id(text: str, where: str) -> None:
    """Raise InputError, naming `where`, for an id of more than MAX_ID_BYTES, or with control characters."""
    if len(text) > MAX_ID_BYTES or len(text.encode()) > MAX_ID_BYTES:
        raise InputError(f"{where}: an id of {len(text.encode()):,} bytes; expected at most {MAX_ID_BYTES:,}")
    if CONTROLS.search(text):
        raise InputError(f"{where}: id {text!r} has a control character; rename it")


def read_beside_users(path: Path, users: Iterable[BesideUser]) -> Iterator[tuple[str, str, BesideUser]]:
    """Yield (file and line, text, user) of each line of a file that has a line for each user of users.tsv.

    users: (user id, value) in the order of users.tsv. Raises InputError, with file and line, for a malformed line, and
    for other users or another order.
    """
    for entry, user in zip_longest(read_table(path, 2), users):
        if entry is None:
            raise InputError(f"{path}: ends before user {user[0]!r}; expected the users of users.tsv in their order")
        line, (user_id, text) = entry
        where = f"{path} line {line}"
        if user is None or user_id != user[0]:
            expected = "the end of the file" if user is None else f"user {user[0]!r}"
            raise InputError(f"{where}: expected {expected}, as in users.tsv, found user {user_id!r}")
        yield where, text, user
