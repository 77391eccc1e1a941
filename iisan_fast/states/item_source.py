"""Define the source of a run's items: stored states, states that are encoded when read, or the encoders' inputs.

A source has two parts. `gather` runs on the host, in the loader's thread, ahead of the step. `read` runs on the device,
in the order of the steps, and never waits for the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import States
from .standardise import StateStatistics


class Chunks(NamedTuple):
    """The inputs of one view's encoder for N items, on the device, in parts.

    order: int64 [N]; `torch.cat(results).index_select(0, order)` puts the results of the parts into the order of the
    items. None if the parts are in that order already.
    """

    parts: list[dict[str, Tensor]]  # nearly equal in size; texts are sorted by length, the longest first
    order: Tensor | None = None


ItemInputs = list[States] | list[Chunks]  # the input of an item encoder for N items, one entry for each view


class Gathered(NamedTuple):
    """Tensors that must be copied to the device before their items can be read there."""

    tensors: list[Tensor]  # in host memory, pinned for CUDA; on the device once the loader has copied them
    layout: Any = None  # what only the host needs to know of them, such as the sizes of parts


class ItemSource(Protocol):
    """The items of a catalogue by number; number 0 is padding."""

    rows: int  # number of items, and one for padding
    index_device: torch.device  # where `read` takes item numbers if nothing was gathered
    items_at_once: int  # items to read at a time when the whole catalogue is read

    @property
    def statistics(self) -> Mapping[str, StateStatistics]:
        """Return the statistics with which each view's states are standardised, by name; empty if they are not."""

    def gather(self, items: Tensor) -> Gathered:
        """Return the tensors in host memory that `read` needs for item numbers int64 [N] on the host.

        Padding (0) must stand last.
        """

    def read(self, items: Tensor, gathered: Gathered | None = None) -> ItemInputs:
        """Return the inputs of an item encoder for N items, on the device.

        items: int64 [N]. gathered: the result of `gather` for these items, copied to the device, where `items` must be
        too; None to gather in this call, with `items` on `index_device`.
        """

    def close(self) -> None:
        """Close the files and threads of the source."""
