"""Divide a cache into shards, stores that different processes fill, and find the shard of an item.

An item's shard depends on its id and the number of shards alone, so a catalogue that grows keeps the places of its
items.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..checksums import name_seed
from ..errors import InputError

FOLDER = "shards"  # in the cache's folder
MOST_SHARDS = 1000  # of a cache; a reader holds three files of each open


@dataclass(frozen=True)
class Shard:
    """One of the shards of a cache."""

    number: int  # from 1
    count: int  # of all shards

    def __str__(self) -> str:
        """Return "2 of 4"."""
        return f"{self.number} of {self.count}"

    def folder(self, cache: Path) -> Path:
        """Return the folder of this shard's store in the folder of a cache."""
        return cache / FOLDER / f"{self.number}-of-{self.count}"

    def holds(self, item_id: str) -> bool:
        """Return True if an item belongs to this shard."""
        return shard_of(item_id, self.count) == self.number - 1

    def command(self, cache: Path) -> str:
        """Return the command that makes this shard, or goes on with it."""
        return f"iisan-fast extract DATASET --cache {cache} --shard {self.number}/{self.count}"


def shard_of(item_id: str | bytes, count: int) -> int:
    """Return the position, from 0, of an item's shard among `count` shards. item_id: also as UTF-8 bytes."""
    return name_seed(item_id if isinstance(item_id, bytes) else item_id.encode()) % count


def all_shards(count: int) -> list[Shard]:
    """Return the shards of a cache in order."""
    return [Shard(number, count) for number in range(1, count + 1)]


def parsed_shard(text: str) -> Shard:
    """Return the shard that a text such as "2/4" names. Raises InputError for another text."""
    if not isinstance(text, str):
        raise InputError(f"shard: expected text as K/N, found {text!r}")
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count <= MOST_SHARDS:
        raise InputError(f"shard: expected K/N, with K from 1 to N and N at most {MOST_SHARDS}, as 2/4; found {text!r}")
    return Shard(number, count)


def shards_of_items(item_ids: Iterable[str], count: int) -> list[Shard]:
    """Return the shards that these items belong to, in order."""
    return [Shard(position + 1, count) for position in sorted({shard_of(item_id, count) for item_id in item_ids})]
