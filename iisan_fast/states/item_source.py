"""The source of a run's items: states in a table, states computed at each reading, or the encoders' inputs.

A source has two parts. `gather` runs on the host, ahead of the step, in the loader's thread. `read` runs on the device,
in the step's order, and never waits.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import States


class Chunks(NamedTuple):
    """The inputs of one view's encoder for N items, on the device, in parts.

    With `order`, int64 [N], `torch.cat(results).index_select(0, order)` puts the parts' results into the items' order.
    Without it they are in that order already.
    """

    parts: list[dict[str, Tensor]]  # of nearly equal size; texts of near-equal length together, the longest first
    order: Tensor | None = None


ItemInputs = list[States] | list[Chunks]  # what an item encoder takes of N items, one entry a view


class Gathered(NamedTuple):
    """Tensors that must be on the device before items can be read there."""

    tensors: list[Tensor]  # in host memory, pinned for CUDA, until the loader has copied them
    layout: Any = None  # facts about them that the host alone needs, such as the sizes of parts


class ItemSource(Protocol):
    """A catalogue's items, by number; 0 is padding."""

    rows: int  # items and the padding
    index_device: torch.device  # of the item numbers that `read` takes when nothing was gathered
    items_at_once: int  # how many items to read at a time when the whole catalogue is read

    def gather(self, items: Tensor) -> Gathered:
        """Do the host's part for item numbers int64 [N] on the host, any padding last."""

    def read(self, items: Tensor, gathered: Gathered | None = None) -> ItemInputs:
        """Return the items' inputs on the device. Without `gathered`, gather first.

        items: int64 [N], the numbers that were gathered, on the device; without `gathered`, on `index_device`.
        """

    def close(self) -> None:
        """Close what is open."""
