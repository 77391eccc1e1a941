"""Read a view of ready-made features as stored states: a file's rows, one for each item of a run."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import FEATURES, FeaturesConfig
from ..errors import InputError
from ..files import absolute_path, as_path
from .feature_content import FeatureContent
from .feature_files import open_content
from .feature_rows import rows_of_items

ITEMS_AT_ONCE = 4096  # items whose features are checked at a time
MOST_MAPPED = 64 << 20  # bytes of the file that stay in memory after they were read
EXPONENTS = {torch.float16: np.int16(0x7C00), torch.bfloat16: np.int16(0x7F80)}  # set in infinite numbers and NaN
SCATTERED = 8  # times as many rows as are read, over which they lie: more is scattered
SCATTERED_AT_ONCE = 64  # scattered rows to read before their pages are left; the system maps up to 2 MiB around each


class Features:
    """The features of a run's items, which lie in a memory-mapped file."""

    def __init__(self, config: FeaturesConfig, content: FeatureContent, item_ids: list[str]) -> None:
        """Take the settings, the content of the file, and the ids of the items.

        Raises InputError if the file lacks a layer or an item, or does not say which row an item has.
        """
        self.config = config
        self._array: np.ndarray | None = content.array
        rows, depth, width = content.array.shape
        self._layers = list(range(depth) if config.layers is None else config.layers)
        if self._layers[-1] >= depth:
            raise InputError(
                f"{config.path}: layers: expected numbers from 0 to {depth - 1}, found {self._layers[-1]}; "
                f"view {config.name!r} has {depth} layer{'s' if depth > 1 else ''}"
            )
        self._rows = rows_of_items(config, content.ids, rows, item_ids)
        by_number = content.ids is None and config.ids is None
        self._description = {
            "source": FEATURES,
            "path": str(absolute_path(as_path("path", config.path))),
            "shape": [rows, depth, width],
            "layers": self._layers,
            "depth": depth,
            "width": width,
            "dtype": str(content.dtype).removeprefix("torch."),
            **({"first_id": int(item_ids[0]) - self._rows[item_ids[0]]} if by_number else {}),
        }
        self._dtype = content.dtype
        self._mapped = 0

    @classmethod
    def open(cls, config: FeaturesConfig, item_ids: list[str]) -> Features:
        """Open the file of a view for these items. Raises InputError if it cannot be used, or lacks an item."""
        return cls(config, open_content(config, item_ids), item_ids)

    def close(self) -> None:
        """Leave the file."""
        self._array = None

    def view(self, name: str) -> dict[str, Any]:
        """Return the description of the view."""
        return self._description

    def where(self, name: str) -> str:
        """Return the view's file and name, for messages."""
        return f"{self.config.path}: view {name!r}"

    def contents(self, view: str, item_ids: Iterable[str]) -> str:
        """Return the sha256 (hex) of the items' features in their dtype, item after item.

        Raises InputError, with the item's id, if a number is not finite.
        """
        digest = sha256()
        for part_ids, states in self._parts(list(item_ids)):
            if not _all_finite(states):
                raise self._not_finite(part_ids, states)
            digest.update(states.view(torch.uint8).numpy())
        return digest.hexdigest()

    def read_ahead(self) -> AbstractContextManager[None]:
        """Return an empty context: the system reads these files ahead by itself."""
        return nullcontext()

    def check(self, view: str, item_ids: list[str]) -> None:
        """Do nothing: the items were looked up when the file was opened."""

    def read(self, view: str, item_ids: list[str], into: Tensor, positions: list[int] | None = None) -> None:
        """Copy the items' features into the tensor `into` [N, K, D]. positions: as `StateReader.read` takes them."""
        assert self._array is not None
        layers = self._layers if positions is None else [self._layers[position] for position in positions]
        rows = np.array([self._rows[item_id] for item_id in item_ids], dtype=np.int64)
        target = into.view(torch.int16).numpy() if into.dtype == torch.bfloat16 else into.numpy()
        is_scattered = rows.size > 1 and int(np.ptp(rows)) > SCATTERED * rows.size
        at_once = SCATTERED_AT_ONCE if is_scattered else max(1, rows.size)
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which `contents` refuses
            for start in range(0, rows.size, at_once):
                part = rows[start : start + at_once]
                chosen = part if len(layers) == self._array.shape[1] else (part[:, None], layers)
                target[start : start + at_once] = np.asarray(self._array)[chosen]
                self._leave_pages(MOST_MAPPED if is_scattered else part.size * self._array[0].nbytes)

    def _parts(self, item_ids: list[str]) -> Iterator[tuple[list[str], Tensor]]:
        """Yield items and their features in parts. The next part overwrites the features."""
        size = min(ITEMS_AT_ONCE, len(item_ids))
        buffer = torch.empty(size, len(self._layers), self._description["width"], dtype=self._dtype)
        for start in range(0, len(item_ids), ITEMS_AT_ONCE):
            part = item_ids[start : start + ITEMS_AT_ONCE]
            self.read(self.config.name, part, buffer[: len(part)])
            yield part, buffer[: len(part)]

    def _not_finite(self, item_ids: list[str], states: Tensor) -> InputError:
        """Return the error for the first number that is not finite."""
        item, layer, number = (~torch.isfinite(states)).nonzero()[0].tolist()
        return InputError(
            f"{self.config.path}: view {self.config.name!r}, item {item_ids[item]!r}: expected finite numbers, found "
            f"{states[item, layer, number].item()} (layer {self._layers[layer]}, number {number}); correct the features"
        )

    def _leave_pages(self, count: int) -> None:
        """Let the system take back the file's pages in memory, once `MOST_MAPPED` bytes of it were read."""
        self._mapped += count
        mapping = getattr(self._array, "_mmap", None)
        if self._mapped >= MOST_MAPPED and mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)
            self._mapped = 0


def _all_finite(states: Tensor) -> bool:
    """Return True if all numbers are finite. Those of 16 bits are compared by their exponent, which is faster."""
    exponent = EXPONENTS.get(states.dtype)
    if exponent is None:
        return bool(np.isfinite(states.numpy()).all())
    return not ((states.view(torch.int16).numpy() & exponent) == exponent).any()
