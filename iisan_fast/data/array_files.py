"""Write and read one-dimensional arrays in an .npz file with checksums, and trust nothing in a file that is read.

A zip can declare sizes that fill the memory, and damage in it appears as nearly any exception or as other numbers.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from ..checksums import checksum
from ..errors import InputError
from ..files import refuse_irregular
from .text_array import TextArray

CHECKSUMS = "checksums"  # the array of the other arrays' checksums, in the order of the file
FAST_LEVEL = 1  # of deflate, for files of more than FREE_BYTES
BYTES_AT_ONCE = 1 << 20
MOST_UNPACKED = 30  # bytes that one byte of a file may give, beyond the first FREE_BYTES
FREE_BYTES = 64 << 20
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<i4|<i8|<u8|[|]u1|<U[0-9]{1,7})', 'fortran_order': False, "
    rb"'shape': \(([0-9]{0,18}),?\), \} *\n",
    re.DOTALL,
)
ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError, OverflowError, struct.error),
    *(KeyError, IndexError),
)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays of integers, or single ones, with a checksum for each. Many bytes are packed less, in less time."""
    checksums = [_checksum(name, np.asarray(array)) for name, array in arrays.items()]
    size = sum(np.asarray(array).nbytes for array in arrays.values())
    level = FAST_LEVEL if size > FREE_BYTES else None
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as archive:
        for name, array in {**arrays, CHECKSUMS: np.array(checksums, dtype=np.uint64)}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def read_arrays(path: Path, known: Collection[str], content: str = "histories") -> dict[str, np.ndarray]:
    """Return the arrays of a file by name. Their checksums are compared; files of older versions have none.

    known: the names that a file may hold. Arrays of integers and of text, with one dimension or none, are read.
    content: what the file holds, for messages.

    Raises InputError, naming the file and the array, if the file is missing, damaged, or declares more than it can
    hold.
    """
    refuse_irregular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive.infolist(), path, known, content)
            arrays = {member.filename[:-4]: _read_member(archive, member, path) for member in archive.infolist()}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ZIP_ERRORS as error:
        raise InputError(f"{path}: not the {content} of a run, or damaged ({_one_line(error)})") from None
    if CHECKSUMS in arrays:
        _compare_checksums(arrays, arrays.pop(CHECKSUMS), path)
    return arrays


def pack_texts(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return texts as one array of UTF-8 bytes, uint8, and the end of each in it, int64."""
    if isinstance(texts, TextArray):
        return texts.content, texts.ends
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(content) for content in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), ends


def unpack_texts(content: np.ndarray, ends: np.ndarray) -> list[str]:
    """Return the texts of `pack_texts`. Raises ValueError if the ends do not fit the bytes, or they are not UTF-8."""
    return list(_packed_texts(content, ends))


def checked_texts(content: np.ndarray, ends: np.ndarray) -> TextArray:
    """Return the texts of `pack_texts`, which stay packed. Raises ValueError as `unpack_texts` does."""
    texts = _packed_texts(content, ends)
    for _ in texts:  # decodes each of them
        pass
    return texts


def _packed_texts(content: np.ndarray, ends: np.ndarray) -> TextArray:
    """Return the texts of `pack_texts`, not decoded yet. Raises ValueError if the ends do not fit the bytes."""
    if content.dtype != np.uint8 or ends.dtype != np.int64 or content.ndim != 1 or ends.ndim != 1:
        raise ValueError(f"expected bytes and their ends, found {content.dtype} and {ends.dtype}")
    if (np.diff(ends, prepend=0) < 0).any() or (ends[-1] if len(ends) else 0) != len(content):
        raise ValueError("the ends of its texts are out of order")
    return TextArray(content, ends)


def _check_members(members: list[zipfile.ZipInfo], path: Path, known: Collection[str], content: str) -> None:
    """Raise InputError if the members of a zip are other than the known arrays, or declare more than it can hold."""
    names = [member.filename.removesuffix(".npy") for member in members]
    allowed = {*known, CHECKSUMS}
    seen = set()
    for name, member in zip(names, members):
        if name not in allowed or not member.filename.endswith(".npy"):
            raise InputError(f"{path}: expected arrays of {content}, found {member.filename[:60]!r}; restore the file")
        if name in seen:
            raise InputError(f"{path}: array {name} stands twice; restore the file")
        seen.add(name)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
            raise InputError(f"{path}: array {name} is encrypted or packed by another method; restore the file")
    size = path.stat().st_size
    unpacked = sum(member.file_size for member in members)
    if unpacked > FREE_BYTES + MOST_UNPACKED * size:
        raise InputError(f"{path}: declares {unpacked} bytes of arrays in a file of {size}; restore the file")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> np.ndarray:
    """Return the array of a member. Raises InputError, naming it, unless its header fits its bytes."""
    name = member.filename[:-4]
    try:
        content = _content_of(archive, member)
    except ZIP_ERRORS as error:
        raise InputError(f"{path}: array {name} is damaged ({_one_line(error)}); restore the file") from None
    header = HEADER.match(content)
    if not header or header.end() != 10 + int.from_bytes(content[8:10], "little"):
        raise InputError(f"{path}: array {name} has no header of a plain array; restore the file")
    dtype = np.dtype(header[1].decode())
    length = int(header[2] or 1)
    if dtype.itemsize * length != len(content) - header.end():
        raise InputError(
            f"{path}: array {name}: expected {length} of {dtype}, found "
            f"{len(content) - header.end()} bytes; restore the file"
        )
    values = np.frombuffer(memoryview(content).toreadonly(), dtype=dtype, count=length, offset=header.end())
    return values if header[2] else values.reshape(())


def _content_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytearray:
    """Return the bytes of a member, of which no second copy is made. Raises one of ZIP_ERRORS if it is damaged."""
    content = bytearray()
    with archive.open(member) as file:
        while part := file.read(BYTES_AT_ONCE):
            content += part
    return content


def _compare_checksums(arrays: Mapping[str, np.ndarray], checksums: np.ndarray, path: Path) -> None:
    """Raise InputError, naming the array, if one has another checksum than was written."""
    if checksums.dtype != np.uint64 or checksums.shape != (len(arrays),):
        raise InputError(f"{path}: array {CHECKSUMS}: expected {len(arrays)} checksums; restore the file")
    for (name, array), expected in zip(arrays.items(), checksums.tolist()):
        if _checksum(name, array) != expected:
            raise InputError(f"{path}: array {name} is damaged: its checksum does not fit; restore the file")


def _checksum(name: str, array: np.ndarray) -> int:
    """Return the checksum of an array's bytes, name, dtype and shape."""
    form = f"{name} {array.dtype.str} {array.shape}"
    return int.from_bytes(checksum(np.ascontiguousarray(array).data, form.encode()), "big")


def _one_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
