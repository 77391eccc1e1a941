"""Hold the contents of a few items beside no histories: those that join the catalogue of a trained run."""

from __future__ import annotations

import html
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import ProtocolConfig
from .images.image_database import ImageLmdb
from .images.image_folder import ImageFolder
from .sequences import Dataset, Sequences


class ItemContents(NamedTuple):
    """The titles, captions and images of N items. Texts are as a file has them: HTML entities are not replaced."""

    item_ids: list[str]
    titles: list[str]
    captions: list[str | None]  # None for an item without one
    images: ImageFolder | ImageLmdb | None = None

    def dataset(self, protocol: ProtocolConfig) -> Dataset:
        """Return a dataset of these items without users, whose texts are read as the protocol has it."""
        titles = self.titles
        captions = self.captions
        if protocol.unescape_titles:
            titles = [html.unescape(title) for title in titles]
            captions = [None if caption is None else html.unescape(caption) for caption in captions]
        if protocol.missing_captions == "title":
            captions = [title if caption is None else caption for caption, title in zip(captions, titles)]
        nothing = np.zeros(0, dtype=np.int64)
        sequences = Sequences([], self.item_ids, np.zeros(1, dtype=np.int64), nothing, protocol.max_inputs)
        root = Path() if self.images is None else self.images.path
        return Dataset(root, titles, captions, protocol, sequences)
