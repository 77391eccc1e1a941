"""Leave out the parts of an image file that its pixels do not need: texts, colour profiles, previews, other tags.

Pillow reads them all before it decodes a pixel, and refuses the image if one is large or broken. What tells the
orientation stays, if it is sound.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

ORIENTATION = 0x0112  # the tag of EXIF
FORMS_OF_NUMBERS = {3: "H", 4: "I"}  # in EXIF, of a type: SHORT and LONG
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ORIENTATION_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")  # keywords in a PNG
TRANSPARENCY_BYTES = {0: range(2, 3), 2: range(6, 7), 3: range(1, 257)}  # of tRNS by the colour type of a PNG
MAX_TEXT_BYTES = 1 << 20  # of a text that may tell the orientation, after it is inflated; Pillow's own bound
JPEG_SIGNATURE = b"\xff\xd8\xff"
ALONE = frozenset((0x01, *range(0xD0, 0xDA)))  # markers of a JPEG that no length follows
SCAN = 0xDA  # the marker before the pixels of a JPEG
COMMENT = 0xFE
AVIF_BRANDS = (b"ftypavif", b"ftypavis")
TAG_HEADERS = (b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08")  # of EXIF, before the number of tags
# Segments that a JPEG's pixels or its orientation need: beginning of the body, and the fewest bytes of the body.
NEEDED_SEGMENTS = {
    0xE0: ((b"JFIF\0", 14),),
    0xE1: ((b"Exif\0\0", 14), (b"http://ns.adobe.com/xap/1.0/\0", 30)),
    0xEE: ((b"Adobe", 12),),
}


def without_metadata(content: bytes) -> bytes:
    """Return a PNG, JPEG or AVIF without the parts that its pixels and orientation do not need; others as they are."""
    if content.startswith(PNG_SIGNATURE):
        return b"".join(_png_parts(content))
    if content.startswith(JPEG_SIGNATURE):
        return b"".join(_jpeg_parts(content))
    if content[4:12] in AVIF_BRANDS:
        return _avif_without_tags(content)
    return content


def orientation_of_tags(tags: bytes) -> int | None:
    """Return the orientation in the bytes of EXIF; None if it is not there. Other tags are not read."""
    tags = tags.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tags[:4])
    if order is None or len(tags) < 8:
        return None
    (first,) = struct.unpack_from(f"{order}I", tags, 4)
    number = int.from_bytes(tags[first : first + 2], "little" if order == "<" else "big")
    for place in range(first + 2, min(first + 2 + 12 * number, len(tags) - 11), 12):
        tag, kind, count = struct.unpack_from(f"{order}HHI", tags, place)
        if tag == ORIENTATION and kind in FORMS_OF_NUMBERS and count == 1:
            return struct.unpack_from(f"{order}{FORMS_OF_NUMBERS[kind]}", tags, place + 8)[0]
    return None


def _png_parts(content: bytes) -> Iterator[bytes]:
    """Yield the signature, the critical chunks, the transparency, and sound chunks that may tell the orientation."""
    yield PNG_SIGNATURE
    position = len(PNG_SIGNATURE)
    yielded: set[bytes] = set()
    while (end := position + 12 + int.from_bytes(content[position : position + 4], "big")) <= len(content):
        kind = content[position + 4 : position + 8]
        chunk = content[position:end]
        position = end
        if kind[0] & 0x20 == 0:  # a capital letter: a critical chunk
            yield chunk
            if kind == b"IEND":
                return
        elif (use := _use_of_chunk(kind, chunk, content[25])) and use not in yielded:
            yielded.add(use)
            yield chunk
    yield content[position:]  # of a file that was cut short


def _use_of_chunk(kind: bytes, chunk: bytes, colour_type: int) -> bytes | None:
    """Return the use of an ancillary chunk of a PNG, of which the first one counts; None to leave it out."""
    if kind not in (b"tRNS", b"eXIf", b"tEXt", b"zTXt", b"iTXt") or _is_broken(chunk):
        return None
    if kind == b"eXIf":
        return kind
    if kind == b"tRNS":
        return kind if len(chunk) - 12 in TRANSPARENCY_BYTES.get(colour_type, ()) else None
    keyword, _, rest = chunk[8:-4].partition(b"\0")
    if keyword not in ORIENTATION_TEXTS:
        return None
    packed = rest[1:] if kind == b"zTXt" else b""
    if kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    return keyword if len(rest) <= MAX_TEXT_BYTES and _inflates_within(packed, MAX_TEXT_BYTES) else None


def _is_broken(chunk: bytes) -> bool:
    """Return True if the checksum of a PNG's chunk is wrong."""
    return zlib.crc32(memoryview(chunk)[4:-4]) != int.from_bytes(chunk[-4:], "big")


def _inflates_within(packed: bytes, most: int) -> bool:
    """Return True if compressed bytes give at most `most` bytes. No more are ever inflated."""
    inflater = zlib.decompressobj()
    try:
        return not packed or (len(inflater.decompress(packed, most + 1)) <= most and not inflater.unconsumed_tail)
    except zlib.error:
        return False


def _avif_without_tags(content: bytes) -> bytes:
    """Return an AVIF whose EXIF has no tags. Its orientation stands elsewhere, in properties of the image."""
    for header in TAG_HEADERS:
        if (start := content.find(header)) >= 0:
            count = start + len(header)
            return content[:count] + bytes(2) + content[count + 2 :]
    return content


def _jpeg_parts(content: bytes) -> Iterator[bytes]:
    """Yield the segments of a JPEG that its pixels and its orientation need.

    Bytes between segments are left out, as libjpeg does, so a segment whose length is too short breaks nothing.
    """
    yield content[:2]
    position = 2
    yielded: set[bytes] = set()
    while (start := content.find(b"\xff", position)) >= 0:
        marker = content[start + 1] if start + 1 < len(content) else SCAN
        if marker in (0x00, 0xFF):  # no marker, or a byte that fills up
            position = start + 1
            continue
        length = int.from_bytes(content[start + 2 : start + 4], "big")
        end = start + 2 + (0 if marker in ALONE else length)
        if marker == SCAN or (marker not in ALONE and length < 2) or end > len(content):
            yield content[start:]
            return
        position = end
        segment = content[start:end]
        if not (0xE0 <= marker <= 0xEF or marker == COMMENT):
            yield segment
        elif (use := _use_of_segment(marker, segment[4:])) and use not in yielded:
            yielded.add(use)
            yield segment


def _use_of_segment(marker: int, body: bytes) -> bytes | None:
    """Return the use of an application's segment of a JPEG, of which the first one counts; None to leave it out."""
    for beginning, fewest in NEEDED_SEGMENTS.get(marker, ()):
        if body.startswith(beginning) and len(body) >= fewest:
            return beginning
    return None
