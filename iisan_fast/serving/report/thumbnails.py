"""Make small pictures of items that a page embeds, within a bound of bytes for all of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps

from ...data import ImageFolder, ImageLmdb, open_images
from ...errors import InputError

FORMS = ((96, 82), (96, 70), (80, 65), (64, 60), (48, 55), (32, 50))  # pixels of a side, and JPEG quality
MOST_BYTES = 1_400_000  # of all pictures as JPEG; as text they take a third more


@dataclass(frozen=True)
class Thumbnails:
    """Square pictures of items, and a sentence about those that are missing."""

    uris: dict[str, str] = field(default_factory=dict)  # data URIs by item id
    note: str = ""


def thumbnails(root: Path, item_ids: Collection[str], most_bytes: int = MOST_BYTES) -> Thumbnails:
    """Return pictures of items from the images of a dataset, as large as `most_bytes` for all allows.

    An item without an image, or with one that cannot be read, has none. Images that cannot be opened at all are no
    error: the note says why.
    """
    try:
        images = open_images(root)
    except (InputError, OSError) as error:
        return Thumbnails(note=f"No pictures: {error}.")
    squares: dict[str, Image.Image] = {}
    problems: list[str] = []
    with images:
        for item_id in item_ids:
            try:
                square = _square(images, item_id)
            except (InputError, OSError) as error:
                problems.append(f"{item_id}: {error}")
                continue
            if square is not None:
                squares[item_id] = square
    return Thumbnails(_within(squares, most_bytes), _note(len(item_ids) - len(squares), problems))


def _square(images: ImageFolder | ImageLmdb, item_id: str) -> Image.Image | None:
    """Return an item's image, cut to a square; None if it has none. Raises InputError if it cannot be read."""
    content = images.content(item_id)
    if content is None:
        return None
    side = FORMS[0][0]
    return ImageOps.fit(images.decode(content), (side, side))


def _within(squares: dict[str, Image.Image], most_bytes: int) -> dict[str, str]:
    """Return data URIs in the largest form in which all pictures together fit; none if no form does."""
    for side, quality in FORMS:
        contents = {item_id: _jpeg(square, side, quality) for item_id, square in squares.items()}
        if sum(map(len, contents.values())) <= most_bytes:
            return {
                item_id: f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
                for item_id, content in contents.items()
            }
    return {}


def _jpeg(square: Image.Image, side: int, quality: int) -> bytes:
    """Return a square picture as a JPEG of a side, without what the file says about its camera."""
    content = io.BytesIO()
    scaled = square if square.width == side else square.resize((side, side))
    scaled.save(content, "JPEG", quality=quality, optimize=True)
    return content.getvalue()


def _note(missing: int, problems: list[str]) -> str:
    """Return a sentence about the items without a picture; "" if there are none."""
    if not missing:
        return ""
    unread = f", of which {len(problems)} cannot be read ({problems[0]})" if problems else ""
    return f"{missing:,} of the items below have no picture{unread}."
