"""An encoder's stand-in that works at once."""

from __future__ import annotations

import time

import torch
from PIL import Image

from iisan_fast.config import ViewConfig


class FakeBackbone:
    """Stands in for an encoder: a state is a few numbers that depend on the content alone."""

    device = torch.device("cpu")

    def __init__(self, view: ViewConfig, seen: list, delay: float = 0, model: object = None) -> None:
        self.view = view
        self.seen = seen
        self.delay = delay
        self.model = model or object()

    def describe(self) -> dict:
        return {"encoder": self.view.encoder, "layers": [0, 1], "depth": 2, "width": 3, "pooling": self.view.pooling}

    def preparation(self, images: list[Image.Image]) -> dict:
        self.seen.extend(images)
        return self.pad([image.tobytes() for image in images])

    def tokenize(self, texts: list[str]) -> list[bytes]:
        self.seen.extend(texts)
        return [list(text.encode()) for text in texts]

    def pad(self, rows: list) -> dict:
        return {"sums": torch.tensor([sum(map(int, row)) for row in rows])}

    def encode_views(self, backbones: list[FakeBackbone], inputs: dict) -> list[torch.Tensor]:
        return [backbone.encode(inputs) for backbone in backbones]

    def encode(self, inputs: dict) -> torch.Tensor:
        time.sleep(self.delay)
        return inputs["sums"][:, None, None] + torch.arange(6.0).view(1, 2, 3)
