"""Open files that gzip, bzip2 or xz may have compressed, and refuse archives and files of programs."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ....errors import InputError

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
PACKED = {
    b"PK\x03\x04": "a zip archive, or a spreadsheet; unzip it first, or save the sheet as CSV",
    b"\x28\xb5\x2f\xfd": "packed by Zstandard; unpack it first: unzstd",
    b"Rar!": "a rar archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\xd0\xcf\x11\xe0": "an old Excel file; save it as CSV first",
    b"ORC": "an ORC file; write it as Parquet first",
    b"Obj\x01": "an Avro file; write it as Parquet first",
    b"ARROW1": "a Feather or Arrow file; write it as Parquet first",
    b"\x89HDF": "an HDF5 file; write it as Parquet first",
    b"SQLite format 3": "an SQLite database; write its table as CSV first",
    b"\x93NUMPY": "an array of NumPy; write it as CSV or Parquet with names of columns first",
    b"MATLAB ": "a file of MATLAB; write it as CSV first",
    b"\x80\x04": "a pickle of Python; write it as Parquet first",
    b"\x80\x05": "a pickle of Python; write it as Parquet first",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch it first: git lfs pull",
}
TAR_MAGIC = b"ustar"
TAR_MAGIC_AT = 257
LOOKED_AT = TAR_MAGIC_AT + len(TAR_MAGIC)  # bytes by which a packed file is known
CANNOT_READ = (OSError, EOFError, zlib.error, lzma.LZMAError)


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file: its content, uncompressed, and its bytes as they are. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            magic = file.read(8)
            file.seek(0)
            open_content = next((reader for mark, reader in COMPRESSED.items() if magic.startswith(mark)), None)
            if open_content is None:
                yield file, file
                return
            with open_content(file) as content:
                yield content, file
    except CANNOT_READ as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from None


def refuse_packed(path: Path, beginning: bytes) -> None:
    """Raise InputError if a file's content begins as an archive, or as a file of another program."""
    if beginning[TAR_MAGIC_AT:].startswith(TAR_MAGIC):
        raise InputError(f"{path}: a tar archive; unpack it first: tar -xf")
    packed = next((problem for magic, problem in PACKED.items() if beginning.startswith(magic)), None)
    if packed is not None:
        raise InputError(f"{path}: {packed}")
