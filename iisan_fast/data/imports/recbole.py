"""Imports of RecBole's atomic files: tab-separated columns under a header of names with types, as `user_id:token`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError
from .delimited import DelimitedText
from .flat import import_tables
from .options import RECBOLE_FIELDS, Imported, TableOptions
from .sources import find

LOGGER = logging.getLogger(__name__)
SEQUENCES = ("token_seq", "float_seq")
TYPES = ("token", "float", *SEQUENCES)
LIST_SUFFIX = "_list"  # RecBole's name for the history before an interaction, as in item_id_list


def import_recbole(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a .inter file, or from a folder that holds one.

    Titles come from the .item file of the same name, if there is one. The options name fields without their types.
    Raises InputError for bad input, and for fields that hold histories, which are not read.
    """
    inter = find(source, "*.inter") if source.is_dir() else source
    if inter is None:
        raise InputError(f"{source}: expected a .inter file in it, found none")
    beside = inter.with_suffix(".item")
    items = options.items or (beside if os.path.lexists(beside) else None)
    user = options.user_column or RECBOLE_FIELDS[0]
    item = options.item_column or RECBOLE_FIELDS[1]
    ids = {user: ("token",), item: ("token",)}
    interactions = _atomic(inter, {**ids, options.timestamp_column or "timestamp": ("float", "token")}, histories=True)
    titles = _atomic(items, {item: ("token",), options.title_column: ("token", "token_seq")}) if items else None
    return import_tables([(interactions, None)], titles, destination, options, RECBOLE_FIELDS)


def _atomic(path: Path, types: dict[str, tuple[str, ...]], histories: bool = False) -> DelimitedText:
    """Return the table of an atomic file, its columns named without their types.

    types: the types that fields which are read may have. histories: fields of sequences may hold histories. Raises
    InputError for another type, and for histories.
    """

    def names_of(path: Path, header: list[str]) -> list[str]:
        fields = [_name_and_type(path, field) for field in header]
        if histories:
            _refuse_histories(path, fields, tuple(types))
        for name, kind in fields:
            if kind not in types.get(name, TYPES):
                expected = " or ".join(f"{name}:{kind}" for kind in types[name])
                raise InputError(f"{path} line 1: field '{name}:{kind}': expected {expected}")
        return [name for name, _ in fields]

    return DelimitedText(path, separator="\t", quoted=False, names_of=names_of)


def _name_and_type(path: Path, field: str) -> tuple[str, str]:
    """Return the name and type of a field of the header. Raises InputError if it has no type of RecBole."""
    name, _, kind = field.rpartition(":")
    if not name or kind not in TYPES:
        if not field.isprintable():
            raise InputError(f"{path}: no header of names in its first line; is it in another format?")
        example = "user_id:token, item_id:token and timestamp:float, with tabs between"
        shown = field if len(field) <= 60 else field[:60] + "…"
        raise InputError(f"{path} line 1: expected a header of fields with types, such as {example}; found {shown!r}")
    return name, kind


def _refuse_histories(path: Path, fields: Sequence[tuple[str, str]], read: tuple[str, ...]) -> None:
    """Say which fields of sequences are not read. Raises InputError if some hold the history of each interaction.

    fields: names and types; read: the names of the fields that are read. A field that is named as the list of one that
    is read, such as item_id_list, is a history whatever its type.
    """
    sequences = [name for name, kind in fields if kind in SEQUENCES and name not in read]
    histories = [
        name
        for name, kind in fields
        if name.endswith(LIST_SUFFIX) and name not in read and (kind in SEQUENCES or name.startswith(read))
    ]
    if histories:
        raise InputError(
            f"{path} line 1: {', '.join(histories)}: a history beside each interaction is not read, and its "
            "items would be lost; make a file of one line an interaction, without such fields"
        )
    if sequences:
        LOGGER.warning("%s: fields of sequences that are not read: %s", path, ", ".join(sequences))
