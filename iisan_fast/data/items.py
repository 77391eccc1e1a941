"""Read the texts of a dataset folder's catalogue: titles and captions (TSV).

No input is trusted: a malformed line is an error that says where it is.
"""

from __future__ import annotations

import html
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .fast_tables import NeedsStrictReader, fast_or_strict, read_texts
from .strict_tables import read_table


@dataclass(frozen=True)
class ItemTable:
    """The contents of items.tsv and captions.tsv, in the order of the file."""

    ids: list[str]
    titles: list[str]
    captions: dict[str, str] | None  # by item id, for the items that have one; None without captions.tsv


def read_items(root: Path, unescape: bool = True) -> ItemTable:
    """Read root/items.tsv and, if there is one, root/captions.tsv. `unescape`: replace HTML entities by characters.

    Raises InputError, with file and line, for a malformed line, an item that occurs twice, or a caption of an item that
    is not in items.tsv.
    """
    titles = _read_texts(root / "items.tsv", unescape)
    captions = root / "captions.tsv"
    return ItemTable(
        ids=list(titles),
        titles=list(titles.values()),
        captions=_read_texts(captions, unescape, known=titles) if os.path.lexists(captions) else None,
    )


def _read_texts(path: Path, unescape: bool, known: Collection[str] | None = None) -> dict[str, str]:
    """Return {item id: text} in file order. Raises InputError for a malformed line, or an item that is not `known`."""
    texts = fast_or_strict(lambda: _read_texts_fast(path, known), lambda: _read_texts_strictly(path, known))
    return {item_id: html.unescape(text) for item_id, text in texts.items()} if unescape else texts


def _read_texts_fast(path: Path, known: Collection[str] | None) -> dict[str, str]:
    """Read {item id: text} by polars. Raises NeedsStrictReader if anything in the file may be wrong."""
    ids, column = read_texts(path)
    texts = dict(zip(ids, column))
    if len(texts) < len(ids) or any(" " in item_id for item_id in ids):
        raise NeedsStrictReader(f"{path}: an item twice, or an id with a space")
    if known is not None and not all(item_id in known for item_id in ids):
        raise NeedsStrictReader(f"{path}: an unknown item")
    return texts


def _read_texts_strictly(path: Path, known: Collection[str] | None) -> dict[str, str]:
    """Read {item id: text} line by line. Raises InputError, with file and line."""
    texts: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, (item_id, text) in read_table(path, 2):
        if item_id in lines:
            raise InputError(f"{path} line {line}: item {item_id!r} stands on line {lines[item_id]} already")
        if known is not None and item_id not in known:
            raise InputError(f"{path} line {line}: item {item_id!r} is not in items.tsv")
        if " " in item_id or "\0" in item_id:
            raise InputError(f"{path} line {line}: item id {item_id!r} has a space or NUL, which no history can name")
        lines[item_id] = line
        texts[item_id] = text
    return texts
