"""Make the small dataset, cache and run that faults are made in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from ... import api, demo
from ...config import ViewConfig
from .children import run_child

ITEMS = 48
USERS = 120
EPOCHS = 3
TIMED = ("train_seconds", "validation_seconds", "items_per_second")
SETTINGS: dict[str, Any] = {
    "max_epochs": EPOCHS,
    "patience": 10,
    "batch_users": 16,
    "embedding_dim": 16,
    "attention_heads": 2,
    "dropout": 0.1,
}


@dataclass(frozen=True)
class Sample:
    """The folders of a sample, and what an undisturbed run on it gives."""

    dataset: Path
    cache: Path
    run: Path
    views: list[ViewConfig]
    expected: dict[str, Any]  # of the run, from `result_of`
    seconds: float  # that the training took


def make_sample(folder: Path) -> Sample:
    """Make the dataset, its encoders, their states and a finished run in a folder.

    Raises RuntimeError if that fails.
    """
    dataset, views = demo.plan(folder)
    generator = np.random.default_rng(0)
    products = demo.make_products(generator)[:ITEMS]
    histories = [list(map(int, generator.integers(0, ITEMS, generator.integers(6, 10)))) for _ in range(USERS)]
    demo.write_dataset(dataset, products, histories)
    cache, run = folder / "cache", folder / "run"
    endings = [
        run_child(lambda: write_encoders(views)),
        run_child(lambda: extract(dataset, cache, views)),
        run_child(lambda: train(dataset, cache, run)),  # compiles the C++ where that was not done yet
    ]
    timed = run_child(lambda: train(dataset, cache, folder / "timed"))
    for ending in [*endings, timed]:
        if ending.kind != "done":
            raise RuntimeError(f"the sample cannot be made: {ending.message}")
    expected = run_child(lambda: result_of(run)).value
    return Sample(dataset, cache, run, views, expected, timed.seconds)


def write_encoders(views: list[ViewConfig]) -> None:
    """Write the two small encoders of the views."""
    image, text = views
    demo.write_text_encoder(Path(text.encoder), 0)
    demo.write_image_encoder(Path(image.encoder), 0)


def extract(dataset: Path, cache: Path, views: list[ViewConfig]) -> None:
    """Fill a cache with the states of the views."""
    api.extract(dataset, cache, views=views, workers=0, batch_size=8)


def train(dataset: Path, cache: Path, out: Path, **changes: Any) -> None:
    """Train a run on the cache."""
    api.train(dataset, cache, out=out, device="cpu", **{**SETTINGS, **changes})


def result_of(run: Path) -> dict[str, Any]:
    """Return all that a run gives, times left out: digests of both checkpoints, its epochs and its figures."""
    checkpoints = {}
    for name in ("best", "last"):
        tensors = safetensors.torch.load_file(run / f"{name}.safetensors")
        digest = hashlib.sha256()
        for tensor_name in sorted(tensors):
            tensor = tensors[tensor_name]
            digest.update(f"{tensor_name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
        checkpoints[name] = digest.hexdigest()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
    return {**checkpoints, "epochs": epochs, "test": json.loads((run / "test.json").read_text())}
