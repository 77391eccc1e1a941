"""Make a cache of random hidden states without an encoder, for catalogues of up to millions of items."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import InputError
from ..states import Store, content_digest, size_text

VIEWS = ("first", "second")
BLOCK = 4096  # items whose states differ, and items of a transaction
PAGE = 4096  # bytes of LMDB's pages, of which an entry takes whole ones
ROOM = 1.05  # of the bytes that entries take, with the pages that lead to them


def made_ids(items: int) -> list[str]:
    """Return the ids of the first items: those of a smaller catalogue are the first ones of a larger one."""
    return [f"i{number:09d}" for number in range(1, items + 1)]


def make_states(cache: Path, items: int, layers: int, width: int, on_part: Callable[[int], None]) -> None:
    """Write the states of two views in bfloat16 into a cache, as far as it does not hold them already.

    on_part: called with the number of items of each part. Raises InputError if the disk lacks room, or if the
    cache holds other states.
    """
    item_ids = made_ids(items)
    description = _description(layers, width)
    with Store(cache, writable=True) as store:
        store.check_views({view: description for view in VIEWS})
        if not _has(store, item_ids[-1]):
            _refuse_lack_of_disk(cache, items, layers * width * 2)
        store.add_views({view: description for view in VIEWS})
        generator = torch.Generator().manual_seed(0)
        shape = min(BLOCK, items), layers, width
        blocks = {view: torch.randn(shape, generator=generator).bfloat16() for view in VIEWS}
        for start in range(0, items, BLOCK):
            part = item_ids[start : start + BLOCK]
            if not _has(store, part[-1]):
                digests = [content_digest(item_id.encode()) for item_id in part]
                store.write_views(part, digests, {view: block[: len(part)] for view, block in blocks.items()})
            on_part(len(part))


def _description(layers: int, width: int) -> dict[str, object]:
    """Return the description of a view in the cache's manifest."""
    return {
        "source": "title",
        "unescaped": True,
        "encoder": "random",
        "layers": list(range(layers)),
        "depth": layers,
        "width": width,
        "dtype": "bfloat16",
    }


def _has(store: Store, item_id: str) -> bool:
    """Return True if the cache has the states of an item in both views. A part is stored at once."""
    return all(view in store.views and next(store.digests(view, [item_id])) is not None for view in VIEWS)


def _refuse_lack_of_disk(cache: Path, items: int, states: int) -> None:
    """Raise InputError if the disk of a cache lacks room. states: bytes of an item's states of a view."""
    pages = -(-(states + 64) // PAGE)
    needed = int(ROOM * len(VIEWS) * items * pages * PAGE)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise InputError(
            f"{cache}: {items:,} items need {size_text(needed)} of disk, found {size_text(free)} free; lower --items, "
            "or choose another folder by --keep"
        )
