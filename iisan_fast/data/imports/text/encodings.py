"""Decode text of any encoding of Python, and say which encoding a file that is not UTF-8 is likely to have."""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable
from pathlib import Path

from ....errors import InputError
from .compression import opened
from .delimited_form import UTF_8, is_utf8

LOGGER = logging.getLogger(__name__)
SAMPLE_BYTES = 64 << 10  # of lines that are not UTF-8, from which the encoding is guessed
COMMON = (
    *("cp1252", "gb18030", "cp932", "cp949", "big5", "euc_jp", "cp1251", "koi8_r", "cp1250", "cp1253", "cp1254"),
    *("cp1255", "cp1256", "cp866", "tis_620", "mac_roman", "cp850"),
)  # encodings that are guessed; of equally likely ones the first
EQUALLY_LIKELY = 0.03  # a difference of charset-normalizer's scores, from 0 to 1
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # it begins with the one of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # byte order marks
UNDECODED = 0xDC00  # a byte that cannot be decoded is this and its number: half a surrogate pair, never UTF-8
HANDLER = "iisan_fast.undecoded"


def _keep_undecoded(error: UnicodeError) -> tuple[str, int]:
    """Return the characters that stand for bytes that cannot be decoded, and the place behind them.

    Raises the error if it is none of decoding.
    """
    if not isinstance(error, UnicodeDecodeError):
        raise error
    end = max(error.end, error.start + 1)
    return "".join(chr(UNDECODED + byte) for byte in error.object[error.start : end]), end


codecs.register_error(HANDLER, _keep_undecoded)


def checked_encoding(name: str) -> str:
    """Return Python's name of an encoding; `UTF_8` for UTF-8. Raises InputError if there is no such encoding."""
    sample = "user,item\n"
    try:
        known = codecs.lookup(name).name
        fits = decoder_of(known)(sample.encode(known), True) == sample
    except (LookupError, ValueError):
        fits = False
    if not fits:
        raise InputError(f"--encoding: expected an encoding of text such as utf-8, cp1252 or gb18030, found {name!r}")
    return UTF_8 if known in ("utf-8", "utf-8-sig") else known


def marked_encoding(beginning: bytes, encoding: str | None) -> str:
    """Return the encoding of a text with this beginning: `encoding`, or the one that a byte order mark says.

    encoding: as `checked_encoding` returns it; None is UTF-8 without a mark.
    """
    marked = next((name for mark, name in MARKS if beginning.startswith(mark)), None)
    if encoding in ("utf-16", "utf-32"):
        return marked if marked is not None and marked.startswith(encoding) else f"{encoding}-le"
    return encoding or marked or UTF_8


def decoder_of(encoding: str) -> Callable[[bytes, bool], str]:
    """Return a function that decodes blocks (block, True if it is the last); bytes that do not fit are kept as marks.

    Raises LookupError if the encoding cannot be decoded block by block.
    """
    return codecs.getincrementaldecoder(encoding)(HANDLER).decode


def undecoded(row: bytes, encoding: str) -> str | None:
    """Return what is wrong with a row that holds bytes of another encoding, None if there are none.

    row: UTF-8, where bytes that could not be decoded are as `decoder_of` keeps them.
    """
    try:
        row.decode()
    except UnicodeDecodeError as error:
        before = row[: error.start]
        start = before.rfind(b"\n") + 1
        if encoding == UTF_8:
            byte = row[error.start]
            place = error.start - start
        else:
            byte = (row[error.start + 1] & 0x0F) << 6 | row[error.start + 2] & 0x3F
            byte &= 0xFF
            place = len(before[start:].decode().encode(encoding, "replace"))
        lines = before.count(b"\n")
        line = f" of the row's line {lines + 1}" if lines else ""
        return f"not {encoding} (byte 0x{byte:02x} at {place + 1}{line})"
    return None


def report_utf_8(path: Path, encoding: str) -> None:
    """Warn of a file that is to be read in another encoding, and whose beginning is UTF-8 beyond ASCII."""
    with opened(path) as (file, _):
        sample = file.read(SAMPLE_BYTES)
    whole = sample[: sample.rfind(b"\n") + 1] or sample
    if not encoding.startswith("utf") and not whole.isascii() and is_utf8(whole):
        LOGGER.warning("%s: looks like UTF-8, and is read as %s; is --encoding right?", path, encoding)


def likely_encoding(text: bytes) -> str | None:
    """Return the encoding that lines which are not UTF-8 are likely to have; None if none of the common ones fits.

    Raises ImportError if charset-normalizer is missing.
    """
    from charset_normalizer import from_bytes

    matches = list(from_bytes(text, cp_isolation=list(COMMON)))
    if not matches:
        return None
    least = min(match.chaos - match.coherence for match in matches)
    likely = [match for match in matches if match.chaos - match.coherence <= least + EQUALLY_LIKELY]
    names = {name for match in likely for name in (match.encoding, *match.could_be_from_charset)}
    return next((name for name in COMMON if name in names), None)
