"""Find the row of each item in a file of features: by the ids of the rows, or by item ids that are whole numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import FeaturesConfig
from ..errors import InputError, first_few
from ..files import refuse_irregular
from .npy_arrays import open_npy

WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


def rows_of_items(config: FeaturesConfig, ids: Sequence[str] | None, rows: int, item_ids: list[str]) -> dict[str, int]:
    """Return the row of each item by its id.

    ids: of the rows in the file, None if it has none. rows: their number. Raises InputError if an item has no row, if
    an id stands twice, or if the rows of whole numbers are not certain.
    """
    if config.ids is not None:
        if ids is not None:
            raise InputError(f"{config.path}: has the ids of its rows already; leave ids out")
        ids = _read_ids(Path(config.ids))
        if len(ids) != rows:
            raise InputError(f"{config.ids}: expected an id for each of {rows} rows of {config.path}, found {len(ids)}")
    if ids is None:
        return _rows_of_numbers(config, rows, item_ids)
    if config.first_id is not None:
        raise InputError(f"{config.path}: first_id: its rows have ids; leave it out")
    by_id = {item_id: row for row, item_id in enumerate(ids)}
    if len(by_id) < len(ids):
        repeated = next(item_id for row, item_id in enumerate(ids) if by_id[item_id] != row)
        first = next(row for row, item_id in enumerate(ids) if item_id == repeated)
        raise InputError(
            f"{config.ids or config.path}: expected each id once, found {repeated!r} in rows {first} and "
            f"{by_id[repeated]}; keep one of them"
        )
    missing = [item_id for item_id in item_ids if item_id not in by_id]
    if missing:
        raise _lacking(config, missing, len(item_ids), f"its ids are like {first_few(ids, len(ids))}")
    return {item_id: by_id[item_id] for item_id in item_ids}


def _rows_of_numbers(config: FeaturesConfig, rows: int, item_ids: list[str]) -> dict[str, int]:
    """Return the rows of items whose ids are whole numbers. Raises InputError if they are not, or are not certain."""
    for item_id in item_ids:
        if not WHOLE_NUMBER.fullmatch(item_id):
            raise InputError(
                f"{config.path}: its rows have no ids, and item id {item_id!r} is no whole number; give ids=FILE with "
                "the item id of each row"
            )
    numbers = [int(item_id) for item_id in item_ids]
    first = config.first_id
    if first is None:
        first = _first_id(config.path, rows, min(numbers), max(numbers))
    missing = [item_id for item_id, number in zip(item_ids, numbers) if not first <= number < rows + first]
    if missing:
        raise _lacking(config, missing, len(item_ids), f"its {rows} rows are the ids {first} to {rows + first - 1}")
    return {item_id: number - first for item_id, number in zip(item_ids, numbers)}


def _first_id(path: str, rows: int, least: int, largest: int) -> int:
    """Return the id of the first row: 0 or 1. Raises InputError if the ids of the items leave it open."""
    if least == 0:
        return 0
    if largest == rows:
        return 1
    raise InputError(
        f"{path}: has {rows} rows without ids, and the item ids are {least} to {largest}; give first_id=0 if the first "
        "row is of item 0, first_id=1 if it is of item 1, or ids=FILE"
    )


def _lacking(config: FeaturesConfig, missing: list[str], total: int, reason: str) -> InputError:
    """Return the error for items without features."""
    return InputError(
        f"{config.path}: view {config.name!r} lacks {len(missing)} of {total} items "
        f"({first_few(missing, len(missing))}); {reason}; give features of every item of the dataset"
    )


def _read_ids(path: Path) -> list[str]:
    """Return the ids in a text file, an id a line, or in a .npy file of whole numbers or text.

    Raises InputError for a file that cannot be read or holds something else.
    """
    if path.suffix.lower() == ".npy":
        return ids_of_array(open_npy(path), str(path))
    refuse_irregular(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{path}: expected item ids in UTF-8, an id a line, found other bytes") from None
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or "\t" in line.strip():
            kind = "a tab" if line.strip() else "an empty line"
            raise InputError(f"{path} line {number}: expected an item id, found {kind}; write an id a line")
    return [line.strip() for line in lines]


def ids_of_array(array: np.ndarray, where: str) -> list[str]:
    """Return the ids of an array of whole numbers or text. where: its place, for messages.

    Raises InputError for an array of another kind or with more than one dimension.
    """
    if array.ndim != 1 or array.dtype.kind not in "iuUS":
        raise InputError(
            f"{where}: expected item ids as one row of whole numbers or text, found {array.dtype} {array.shape}"
        )
    if array.dtype.kind == "S":
        try:
            return [value.decode() for value in array.tolist()]
        except UnicodeDecodeError:
            raise InputError(f"{where}: expected item ids in UTF-8, found other bytes") from None
    return [str(value) for value in array.tolist()]
