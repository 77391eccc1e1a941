"""Imports of datasets with the file names of the released IISAN code, such as am_NAME_users.tsv and am_xx.lmdb."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ....errors import InputError
from ..flat import import_tables
from ..options import Imported, TableOptions
from ..text.delimited import DelimitedText
from .sources import find, unpacked

ITEMS, USERS = "*_items.tsv", "*_users*.tsv"


def import_iisan(source: Path, destination: Path, options: TableOptions = TableOptions()) -> Imported:
    """Make a dataset from a folder of the released IISAN code.

    Images come from the LMDB or the folder am_image_* in it. If the folder has none, they come from the folder above,
    where the released code writes them; there they are named by the initials of the dataset. Raises InputError for bad
    input.
    """
    folder = unpacked(source)
    items, users = find(folder, ITEMS), find(folder, USERS)
    if items is None or users is None:
        missing = ITEMS if items is None else USERS
        raise InputError(f"{folder}: expected {missing} in it, found none; both {ITEMS} and {USERS} are needed")
    initials = _initials(items.name.removesuffix(ITEMS[1:]))
    covers = options.covers or find(folder, "*.lmdb", "am_image_*")
    covers = covers or find(folder.resolve().parent, f"am_{initials}.lmdb", f"am_image_{initials}")
    histories = DelimitedText(users, "\t", quoted=False, columns=("user", "item"))
    titles = DelimitedText(items, "\t", quoted=False, columns=("item", "title"))
    options = replace(options, covers=covers, timestamp_column="-", item_separator=" ")
    return import_tables([(histories, None)], titles, destination, options)


def _initials(name: str) -> str:
    """Return the first letters of the first and the last word of a dataset's name, as in am_is.lmdb."""
    words = [word for word in name.removeprefix("am_").split("_") if word]
    return f"{words[0][0]}{words[-1][0]}".lower() if words else ""
