"""Extractions into a cache: datasets to extract from, what is stored, and a stop in the middle."""

from __future__ import annotations

import itertools
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.datasets import make_sequences, write_dataset_folder
from iisan_fast import demo
from iisan_fast.config import ExtractionConfig, ViewConfig
from iisan_fast.data.sequences import load_dataset
from iisan_fast.encoders.base import Backbone
from iisan_fast.states import extraction


def run(root: Path, cache: Path, *views: ViewConfig, **options) -> list[tuple[int, int]]:
    """Extract, and return (encoded, blank) of each view."""
    config = ExtractionConfig(batch_size=4, dtype="float32", **options)
    results = extraction.extract(load_dataset(root), list(views), cache, torch.device("cpu"), config)
    return [(result.encoded, result.blank) for result in results]


def entries(cache: Path) -> dict[bytes, bytes]:
    """Return the store's keys and values."""
    with lmdb.open(str(cache / "states.lmdb"), readonly=True) as env, env.begin() as transaction:
        return dict(transaction.cursor())


def write_varied_items(folder: Path) -> Path:
    """Write a dataset of forty items: titles of one to twenty words, images of noise, one missing, one damaged."""
    count = 40
    generator = np.random.default_rng(0)
    root = write_dataset_folder(folder, make_sequences([list(range(1, count + 1))], max_inputs=count))
    (root / "users.tsv").write_text("".join(f"u{n}\t{' '.join(f'i{n + k}' for k in range(8))}\n" for n in range(1, 34)))
    words = [*demo.BRANDS, *demo.MATERIALS]
    titles = [" ".join(generator.choice(words, size=generator.integers(1, 21))) for _ in range(count)]
    (root / "items.tsv").write_text("".join(f"i{n + 1}\t{title}\n" for n, title in enumerate(titles)))
    (root / "images").mkdir()
    for n in range(2, count + 1):
        noise = generator.integers(0, 256, (int(generator.integers(9, 90)), 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "images" / f"i{n}.png")
    (root / "images" / "i9.png").write_bytes(b"damaged")
    return root


def interrupt(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """Make extraction stop before this batch, as a person who presses Ctrl-C does."""
    encode = Backbone.encode_views
    calls = itertools.count()

    def interrupted(self, backbones, inputs):
        if next(calls) == batch:
            raise KeyboardInterrupt
        return encode(self, backbones, inputs)

    monkeypatch.setattr(Backbone, "encode_views", interrupted)
