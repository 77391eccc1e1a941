"""What training reads items from: states that lie in a table, states made as they are read, or the contents themselves.

A source's part that runs on the host is taken ahead of the step, in the loader's thread; its part that runs on the
device is taken in the step's own order and never waits.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Gathered(NamedTuple):
    """What has to be on the device before items can be read there."""

    tensors: list[Tensor]  # in host memory, pinned for CUDA, until the loader has copied them
    layout: Any = None  # what the host alone has to know of them, such as the sizes of parts


class ItemSource(Protocol):
    """A catalogue's items, by number; 0 is padding."""

    rows: int  # items and the padding
    index_device: torch.device  # where item numbers have to lie that nothing was gathered for
    items_at_once: int  # how many may be read at a time when all are

    def gather(self, items: Tensor) -> Gathered:
        """The host's part for item numbers int64 [N] on the host, any padding last."""

    def read(self, items: Tensor, gathered: Gathered | None = None) -> list[Any]:
        """What an item encoder reads of items, on the device, for each view; without `gathered`, gathers itself.

        items: int64 [N], the numbers that were gathered for; on the device then, else on `index_device`.
        """

    def close(self) -> None:
        """Gives back what is open."""
