"""Read whole lines of a text file some megabytes at a time, which may be compressed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ....errors import InputError
from ....progress import progress_bar
from ..text.compression import opened

BLOCK_BYTES = 8 << 20
MAX_LINE_BYTES = 64 << 20
BYTE_ORDER_MARK = "\ufeff".encode()
MEGABYTE = 1_000_000


class LineBlock(NamedTuple):
    """Whole lines, each with its line end."""

    content: bytes
    first: int  # number of the first line, from 1
    count: int  # of lines


def line_blocks(path: Path) -> Iterator[LineBlock]:
    """Yield the lines of a file in blocks.

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
            content = rest + more[:end]
            rest = more[end:]
            block = LineBlock(content, line, content.count(b"\n"))
            yield block
            line += block.count
            advance(compressed.tell() // MEGABYTE - done)
            done = compressed.tell() // MEGABYTE
        if rest:
            content = rest if rest.endswith(b"\n") else rest + b"\n"
            yield LineBlock(content, line, content.count(b"\n"))
