"""A user's program that `make lint` type-checks: right calls pass, and each wrong one is an error.

Every `type: ignore` below marks an error that mypy must find; if it finds none there, `make lint` fails.
"""

from __future__ import annotations

from pathlib import Path

from iisan_fast.config import ModelConfig, ProtocolConfig, RunConfig, from_dict
from iisan_fast.data import Dataset, load_dataset


def right(folder: Path) -> int:
    dataset: Dataset = load_dataset(folder, ProtocolConfig(min_interactions=5))
    config: RunConfig = from_dict(RunConfig, {"dataset": str(folder), "model": {"method": "id"}})
    return config.train.batch_users + len(dataset.titles)


def wrong(folder: Path) -> None:
    ModelConfig(embedding_dim="64")  # type: ignore[arg-type]
    load_dataset(folder, ModelConfig())  # type: ignore[arg-type]
    dataset: Dataset = load_dataset(folder)
    dataset.tittles  # type: ignore[attr-defined]  # noqa: B018
