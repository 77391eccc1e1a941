"""Read JPEG files that lack their last two bytes, the end marker: all pixels may stand before it."""

from __future__ import annotations

import io

from PIL import Image

END = b"\xff\xd9"
# More pixels for a decoder that still expects some, and no marker. Each begins with other bits.
CONTINUATIONS = (b"", *(bytes((byte, 255 - byte)) * 500 for byte in (0x55, 0xAA, 0xCC, 0x39, 0xFE)))


def jpeg_without_end(content: bytes) -> Image.Image | None:
    """Return the image of a JPEG whose end marker is missing; None if pixels are missing too.

    A decoder that lacks pixels takes what follows as pixels. So the file is whole if all continuations give the same
    image. A progressive JPEG could lack its finer scans, and is never whole. Raises what Pillow does for other damage.
    """
    body = content.removesuffix(END[:1])
    images = [Image.open(io.BytesIO(body + rest + END), formats=["JPEG"]) for rest in CONTINUATIONS]
    if images[0].info.get("progressive"):
        return None
    pixels = {image.tobytes() for image in images}
    return images[0] if len(pixels) == 1 else None
