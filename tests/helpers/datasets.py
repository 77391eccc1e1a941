"""Make small datasets, and name the folder of the real ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from iisan_fast.data.sequences import Sequences

DATA = Path(os.environ.get("IISAN_FAST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def make_sequences(histories: list[list[int]], items: int | None = None, max_inputs: int = 10) -> Sequences:
    """Return the sequences of histories of item numbers."""
    flat = np.concatenate([np.array(history, dtype=np.int64) for history in histories])
    offsets = np.cumsum([0, *map(len, histories)])
    count = items or int(flat.max())
    return Sequences(
        [f"u{i}" for i in range(len(histories))], [f"i{i}" for i in range(1, count + 1)], offsets, flat, max_inputs
    )


def write_dataset_folder(root: Path, sequences: Sequences) -> Path:
    """Write items.tsv and users.tsv of sequences, and return the folder."""
    root.mkdir(parents=True, exist_ok=True)
    titles = "".join(f"{item_id}\ttitle of {item_id}\n" for item_id in sequences.item_ids)
    (root / "items.tsv").write_text(titles)
    histories = np.split(sequences.items, sequences.offsets[1:-1])
    lines = (
        f"{user_id}\t{' '.join(sequences.item_ids[item - 1] for item in history)}\n"
        for user_id, history in zip(sequences.user_ids, histories)
    )
    (root / "users.tsv").write_text("".join(lines))
    return root


def histories_in_steps(users: int, items: int) -> list[list[int]]:
    """Return histories of 5 to 13 items that can be learned: an item's number is 3 more than the one before."""
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, items, users), rng.integers(5, 14, users)
    return [[(start + 3 * i) % items + 1 for i in range(length)] for start, length in zip(starts, lengths)]


def histories_at_random(users: int, items: int) -> list[list[int]]:
    """Return random histories of 5 to 13 items; the first has 13."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, items + 1, length).tolist() for length in rng.integers(5, 14, users)]
    histories[0] = list(range(1, 14))
    return histories


def write_catalogue(root: Path, histories: list[list[int]], items: int) -> Path:
    """Write a dataset's folder: titles of one to twenty words of the demo's encoder, images of noise in all sizes."""
    from iisan_fast import demo  # imports transformers, which takes seconds

    write_dataset_folder(root, make_sequences(histories, items))
    generator = np.random.default_rng(0)
    words = [*demo.BRANDS, *demo.MATERIALS]
    titles = [" ".join(generator.choice(words, size=generator.integers(1, 21))) for _ in range(items)]
    (root / "items.tsv").write_text("".join(f"i{n}\t{title}\n" for n, title in enumerate(titles, start=1)))
    (root / "images").mkdir()
    for n in range(1, items + 1):
        size = int(generator.integers(9, 90)), int(generator.integers(9, 90)), 3
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(root / "images" / f"i{n}.png")
    return root
