"""Choose the .inter files of a RecBole dataset in a folder: the whole one, the parts of a split, or pieces of it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from ....errors import InputError, first_few
from .sources import in_natural_order, with_parts

LOGGER = logging.getLogger(__name__)
SUFFIX = ".inter"
EXAMPLE = "NAME.train.inter, NAME.valid.inter and NAME.test.inter"


class InterFiles(NamedTuple):
    """The .inter files of one dataset, in the order of reading."""

    name: str  # of the dataset, as its .item file has it
    files: list[tuple[Path, str | None]]  # each with the one of PARTS that it holds; None if there is no split


def find_inter_files(source: Path) -> InterFiles:
    """Return the files to read of a .inter file or of a folder with the files of one dataset.

    NAME.inter is read alone, whatever lies beside it. Without it, NAME.train.inter, NAME.valid.inter and
    NAME.test.inter are a given split, and other NAME.PIECE.inter are read one after the other. Raises InputError if
    there is no such file, or if there are several datasets.
    """
    if not source.is_dir():
        if not os.path.lexists(source):
            raise InputError(f"{source}: no such file or folder")
        return InterFiles(_name_beside_items(source), [(source, None)])
    paths = sorted(source.glob(f"*{SUFFIX}"), key=in_natural_order)
    if not paths:
        raise InputError(f"{source}: expected a .inter file in it, found none")
    stems = {path: path.name.removesuffix(SUFFIX) for path in paths}
    wholes = [path for path in paths if not any(_is_piece(stems[path], stem) for stem in stems.values())]
    if len(wholes) == 1:
        whole = wholes[0]
        beside = [path.name for path in paths if path != whole]
        if beside:
            names = first_few(beside, len(beside))
            LOGGER.warning("%s: read alone, without %s beside it, as parts of the same", whole, names)
        return InterFiles(stems[whole] if beside else _name_beside_items(whole), [(whole, None)])
    names_and_pieces = [stems[path].rpartition(".") for path in paths]
    dataset_names = {name for name, _, _ in names_and_pieces}
    if len(dataset_names) > 1 or "" in dataset_names:
        names = first_few((path.name for path in paths), len(paths))
        raise InputError(f"{source}: expected the .inter files of one dataset, found {names}; name the file to read")
    files = with_parts(source, paths, [piece for _, _, piece in names_and_pieces], EXAMPLE)
    if files[0][1] is None:
        LOGGER.warning("%s: read one after the other: %s", source, ", ".join(path.name for path in paths))
    return InterFiles(dataset_names.pop(), files)


def _name_beside_items(path: Path) -> str:
    """Return the name of a file's dataset: the one of the .item file beside it, with or without the file's piece."""
    stem = path.name.removesuffix(SUFFIX)
    name = stem.rpartition(".")[0]
    if name and not os.path.lexists(path.with_name(f"{stem}.item")) and os.path.lexists(path.with_name(f"{name}.item")):
        return name
    return stem


def _is_piece(stem: str, name: str) -> bool:
    """Return True if a file's name says that it is a piece of the file NAME.inter."""
    return stem.startswith(f"{name}.")
