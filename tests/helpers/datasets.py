"""Datasets that are made on the spot, and the folder of the real ones."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from iisan_fast.data.sequences import Sequences

DATA = Path(os.environ.get("IISAN_FAST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def make_sequences(histories: list[list[int]], items: int | None = None, max_inputs: int = 10) -> Sequences:
    """Sequences of hand-written histories of item numbers."""
    flat = np.concatenate([np.array(history, dtype=np.int64) for history in histories])
    offsets = np.cumsum([0, *map(len, histories)])
    count = items or int(flat.max())
    return Sequences(
        [f"u{i}" for i in range(len(histories))], [f"i{i}" for i in range(1, count + 1)], offsets, flat, max_inputs
    )


def write_dataset_folder(root: Path, sequences: Sequences) -> Path:
    """items.tsv and users.tsv of made-up sequences."""
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
