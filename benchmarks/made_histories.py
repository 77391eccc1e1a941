"""Write a synthetic dataset of many interactions, some users at a time: an item's popularity falls as 1 / its rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

SHORTEST, LONGEST = 5, 13  # histories, of which the protocol cuts none
USERS_AT_ONCE = 100_000
STRIDE = 7919  # a prime: popular items lie all over the catalogue


def write_histories(folder: Path, interactions: int, items: int, written: Callable[[int], None]) -> None:
    """Write items.tsv and users.tsv into a new folder, with about as many interactions, and short titles.

    written: called with the number of interactions of each part.
    """
    folder.mkdir()
    width = len(str(items - 1))
    titles = (f"i{item:0{width}d}\tproduct {item}\n" for item in range(items))
    (folder / "items.tsv").write_text("".join(titles))
    generator = np.random.default_rng(0)
    users = max(1, interactions * 2 // (SHORTEST + LONGEST))
    item_words = np.concatenate([_words("i", np.arange(items), width), np.full((items, 1), ord(" "), np.uint8)], axis=1)
    with (folder / "users.tsv").open("wb") as file:
        for first in range(0, users, USERS_AT_ONCE):
            numbers = np.arange(first, min(first + USERS_AT_ONCE, users))
            lengths = generator.integers(SHORTEST, LONGEST + 1, len(numbers))
            ranks = np.exp(generator.random(lengths.sum()) * np.log(items + 1)).astype(np.int64) - 1
            file.write(
                _lines(numbers, len(str(users - 1)), lengths, item_words[np.minimum(ranks, items - 1) * STRIDE % items])
            )
            written(int(lengths.sum()))


def _lines(users: np.ndarray, width: int, lengths: np.ndarray, words: np.ndarray) -> memoryview:
    """Return the lines of users.tsv. words: uint8 [interactions, bytes of an id and a space]."""
    ends = np.cumsum(lengths)
    words[ends - 1, -1] = ord("\n")
    heads = np.concatenate([_words("u", users, width), np.full((len(users), 1), ord("\t"), np.uint8)], axis=1)
    is_head = np.zeros(heads.size + words.size, dtype=bool)
    starts = (ends - lengths) * words.shape[1] + np.arange(len(users)) * heads.shape[1]
    is_head[starts[:, None] + np.arange(heads.shape[1])] = True
    content = np.empty(len(is_head), dtype=np.uint8)
    content[is_head] = heads.ravel()
    content[~is_head] = words.ravel()
    return content.data


def _words(letter: str, numbers: np.ndarray, width: int) -> np.ndarray:
    """Return ids, a letter and `width` digits each, as bytes, uint8 [numbers, width + 1]."""
    powers = 10 ** np.arange(width - 1, -1, -1)
    digits = (numbers[:, None] // powers % 10 + ord("0")).astype(np.uint8)
    return np.concatenate([np.full((len(numbers), 1), ord(letter), np.uint8), digits], axis=1)
