"""The sizes of a measurement, those of a dry run, and how a stage saves its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """The sizes of a measurement, and where it runs."""

    stage: str
    dataset: Path
    out: Path
    commit: str | None
    device: str = "cuda"
    users: int = 64  # a batch
    many_users: int = 8192  # of a batch of the ops
    width: int = 768
    layers: int = 7
    epochs: int = 3  # timed
    steps: int = 20  # profiled, or timed one by one
    rounds: int = 5
    encoders: str = "base"  # sizes of the encoders whose states are extracted: ViT-B/16 and BERT-base, or "demo"
    items: int = 2048  # that are encoded from memory
    extracted_items: int | None = None  # that `iisan-fast extract` encodes; None: all

    @property
    def dry_run(self) -> bool:
        """Tell whether a CPU stands in for the GPU, and a call for each graph."""
        return self.device == "cpu"


DRY_RUN = {
    "device": "cpu",
    "users": 8,
    "many_users": 16,
    "width": 16,
    "layers": 2,
    "epochs": 1,
    "steps": 2,
    "rounds": 1,
    "encoders": "demo",
    "items": 8,
    "extracted_items": 200,
}

Save = Callable[[dict[str, Any]], None]  # takes the result as far as it is
