"""Read whole lines of a text file some megabytes at a time, which gzip may have compressed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ...errors import InputError
from ...progress import progress_bar

BLOCK_BYTES = 8 << 20
MAX_LINE_BYTES = 64 << 20
BYTE_ORDER_MARK = "\ufeff".encode()
GZIP_MAGIC = b"\x1f\x8b"
MEGABYTE = 1_000_000


def line_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number of a block's first line, from 1, and the block: whole lines, each with its line end.

    Raises InputError if the file cannot be read, and for a line that is too long.
    """
    size = path.stat().st_size
    with (
        opened(path) as (file, compressed),
        progress_bar(f"reading {path.name}", size // MEGABYTE, "MB") as advance,
    ):
        line = 1
        done = 0
        rest = file.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
        while more := file.read(BLOCK_BYTES):
            end = more.rfind(b"\n") + 1
            if not end:
                rest += more
                if len(rest) > MAX_LINE_BYTES:
                    raise InputError(f"{path} line {line}: longer than {MAX_LINE_BYTES >> 20} MB; is it JSON lines?")
                continue
            block = rest + more[:end]
            rest = more[end:]
            yield line, block
            line += block.count(b"\n")
            advance(compressed.tell() // MEGABYTE - done)
            done = compressed.tell() // MEGABYTE
        if rest:
            yield line, rest if rest.endswith(b"\n") else rest + b"\n"


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file: its content, uncompressed, and its bytes as they are. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(GZIP_MAGIC))
            file.seek(0)
            if magic != GZIP_MAGIC:
                yield file, file
                return
            with gzip.open(file) as content:
                yield content, file
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from None
