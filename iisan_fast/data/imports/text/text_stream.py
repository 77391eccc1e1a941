"""Read text of any encoding, which gzip, bzip2 or xz may have compressed, as a stream of UTF-8."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ....errors import InputError
from .compression import LOOKED_AT, opened, refuse_packed
from .delimited_form import MAX_ROW_BYTES, UTF_8, is_utf8
from .encodings import SAMPLE_BYTES, decoder_of, likely_encoding, marked_encoding

BYTE_ORDER_MARK = "\ufeff".encode()
HEAD_BYTES = 1 << 20
READ_AT_ONCE = 1 << 20
LOOKED_THROUGH = 16 << 20  # bytes from the first line that is not UTF-8, for others
EXCEL_LINE = re.compile(rb"sep=(.)\r?\n")  # Excel writes the separator into a line of its own
RETURNS = re.compile(rb"\r\n?")  # line ends of a text without newlines
RETURNS_AND_NEWLINE = re.compile(rb"\r+\n")  # line ends of a text whose line ends were written twice


class Beginning(NamedTuple):
    """The beginning of a text."""

    rows: bytes  # whole rows, with the header if there is one
    skipped: int  # bytes before them
    separator: bytes | None  # said before them
    encoding: str  # of the text


class TextStream:
    """A text as UTF-8, without a byte order mark at its start, and with newlines if its line ends are returns alone."""

    def __init__(self, file: BinaryIO, raw: BinaryIO, encoding: str) -> None:
        """Read the beginning. file: the text, uncompressed. raw: the bytes of the file. encoding: of the text."""
        self.encoding = encoding
        self._raw = raw
        self._read = file.read if encoding == UTF_8 else _decoded(file.read, encoding)
        head = self._more(b"", HEAD_BYTES)
        head = head.removeprefix(BYTE_ORDER_MARK)
        pattern = _line_ends(head)
        if pattern is not None:
            rest = io.BytesIO(head).read
            source = self._read
            self._read = _with_newlines(lambda size: rest(size) or source(size), pattern)
            head = self._more(b"", HEAD_BYTES)
        if b"\n" not in head:
            head = self._more(head, MAX_ROW_BYTES)
        self.head = head  # 1 MiB, or the first line if it is longer, or all
        self._unread = io.BytesIO(head)

    def read(self, size: int) -> bytes:
        """Return about `size` bytes; none at the end."""
        return self._unread.read(size) or self._read(size)

    def place(self) -> int:
        """Return the number of bytes of the file that were read."""
        return self._raw.tell()

    def _more(self, content: bytes, size: int) -> bytes:
        """Return `content` and what follows it up to `size` bytes or the end."""
        blocks = [content]
        length = len(content)
        while length < size and (block := self._read(size - length)):
            blocks.append(block)
            length += len(block)
        return b"".join(blocks)


@contextmanager
def open_text(path: Path, encoding: str | None = None) -> Iterator[TextStream]:
    """Open a file as a text. encoding: as `checked_encoding` returns it; None: UTF-8, or as a byte order mark says.

    Raises InputError if it cannot be read, and if it is an archive or a spreadsheet.
    """
    try:
        with opened(path) as (file, raw):
            beginning = file.read(LOOKED_AT)
            file.seek(0)
            refuse_packed(path, beginning)
            yield TextStream(file, raw, marked_encoding(beginning, encoding))
    except UnicodeError as error:
        raise InputError(f"{path}: cannot be read as {encoding} ({error}); choose another --encoding") from None


def read_beginning(path: Path, encoding: str | None = None) -> Beginning:
    """Return the beginning of a text. encoding: as of `open_text`. Raises InputError as it does."""
    with open_text(path, encoding) as text:
        head = text.head
        encoding = text.encoding
    said = EXCEL_LINE.match(head)
    skipped = said.end() if said else 0
    is_part = len(head) >= HEAD_BYTES and b"\n" in head[skipped:]
    rows = head[skipped : head.rindex(b"\n") + 1 if is_part else None]
    return Beginning(rows if rows.endswith(b"\n") else rows + b"\n", skipped, said[1] if said else None, encoding)


def encoding_hint(path: Path, usual: str, has_option: bool) -> str:
    """Return what to do about a text that is not in the expected encoding.

    usual: the hint if most of it is UTF-8. has_option: the user can name an encoding. Raises InputError if the file
    cannot be read.
    """
    others, utf8 = _lines_beyond_ascii(path)
    if utf8 > len(others):
        return f"other lines are UTF-8; {usual}"
    try:
        likely = likely_encoding(b"\n".join(others)[:SAMPLE_BYTES])
    except ImportError:
        return f"{_name_encoding(None, has_option)} (pip install charset-normalizer to have it guessed)"
    return _name_encoding(likely, has_option)


def _name_encoding(likely: str | None, has_option: bool) -> str:
    """Return the advice for a text that is likely to have an encoding, None if nothing is likely."""
    looks = "" if likely is None else f"it looks like {likely}"
    if has_option:
        named = f"{looks}: --encoding {likely}" if looks else "name its encoding with --encoding"
        return f"{named}, or save the file as UTF-8"
    return f"{looks}; save the file as UTF-8" if looks else "save the file as UTF-8"


def _lines_beyond_ascii(path: Path) -> tuple[list[bytes], int]:
    """Return the first lines that are not UTF-8, and the number of lines that are, but not ASCII, until then."""
    others: list[bytes] = []
    utf8 = 0
    length = 0
    looked_through = 0
    rest = b""
    with opened(path) as (file, _):
        while length < SAMPLE_BYTES and looked_through < LOOKED_THROUGH:
            block = file.read(READ_AT_ONCE)
            *lines, rest = (rest + (block or b"\n")).split(b"\n")
            beyond = [line for line in lines if not line.isascii()]
            misfits = [line for line in beyond if not is_utf8(line)]
            utf8 += len(beyond) - len(misfits)
            others += misfits
            length += sum(map(len, misfits))
            looked_through += len(block) if others else 0
            if not block:
                break
    return others, utf8


def _decoded(read: Callable[[int], bytes], encoding: str) -> Callable[[int], bytes]:
    """Return a function that reads a text of another encoding as UTF-8."""
    decode = decoder_of(encoding)

    def read_decoded(size: int) -> bytes:
        while block := read(max(size, 1)):
            if text := decode(block, False):
                return text.encode("utf-8", "surrogatepass")
        return decode(b"", True).encode("utf-8", "surrogatepass")

    return read_decoded


def _line_ends(head: bytes) -> re.Pattern[bytes] | None:
    """Return the pattern of line ends that become newlines, None for a text with usual line ends."""
    first = head.find(b"\n")
    if first < 0:
        return RETURNS if b"\r" in head else None
    return RETURNS_AND_NEWLINE if head.endswith(b"\r\r", 0, first) else None


def _with_newlines(read: Callable[[int], bytes], pattern: re.Pattern[bytes]) -> Callable[[int], bytes]:
    """Return a function that reads a text and makes its line ends newlines."""
    held = b""  # returns, of which the next block may hold the rest

    def read_with_newlines(size: int) -> bytes:
        nonlocal held
        while block := read(size):
            content = held + block
            whole = content.rstrip(b"\r")
            held = content[len(whole) :]
            if whole:
                return pattern.sub(b"\n", whole)
        last, held = held, b""
        return pattern.sub(b"\n", last)

    return read_with_newlines
