"""Write arrays into the files of a folder, and map them again after their checksums were compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checksums import checksum, file_checksum
from .growing_arrays import array_file, mapped_array

INDEX = "index.json"
DTYPES = ("|u1", "|i1", "<i4", "<i8")


class DamagedArrays(Exception):
    """A folder's arrays cannot be used; the message says why in one line."""


def write_index(folder: Path, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
    """Write the arrays that have no file in a folder yet, and then its index, with values that JSON can hold.

    arrays: by name, of one dimension. Raises OSError if there is no room.
    """
    entries = {}
    for name, array in arrays.items():
        path = array_file(folder, name)
        if not path.exists():
            path.write_bytes(np.ascontiguousarray(array).data)
        entries[name] = [array.dtype.str, len(array), file_checksum(path, name.encode()).hex()]
    content = json.dumps({"arrays": entries, "values": values}).encode()
    (folder / INDEX).write_bytes(checksum(content).hex().encode() + b"\n" + content)


def read_arrays_of(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays of a folder, read-only and mapped, by name, and its values.

    Raises DamagedArrays if a file is missing, or has other bytes than were written.
    """
    try:
        recorded, _, content = (folder / INDEX).read_bytes().partition(b"\n")
        if recorded != checksum(content).hex().encode():
            raise DamagedArrays(f"{INDEX} is damaged")
        index = json.loads(content)
        arrays = {name: _read_array(folder, name, *entry) for name, entry in index["arrays"].items()}
    except OSError as error:
        raise DamagedArrays(f"{Path(error.filename or folder).name}: {error.strerror}") from None
    return arrays, index["values"]


def _read_array(folder: Path, name: str, dtype: str, count: int, recorded: str) -> np.ndarray:
    """Return one array. Raises DamagedArrays, and OSError if its file is missing."""
    path = array_file(folder, name)
    size = path.stat().st_size
    if dtype not in DTYPES or size != count * np.dtype(dtype).itemsize:
        raise DamagedArrays(f"{path.name}: expected {count} numbers of {dtype}, found {size} bytes")
    if file_checksum(path, name.encode()).hex() != recorded:
        raise DamagedArrays(f"{path.name}: its checksum does not fit")
    return mapped_array(path, np.dtype(dtype))
