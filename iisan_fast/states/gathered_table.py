"""Define a table that is not on the device: the rows of a batch are gathered on the host, and copied to the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels import States
from .item_source import Gathered
from .standardise import StateStatistics
from .view_shapes import ViewShape

STATES_AT_ONCE = 8192  # items to read at a time when the whole table is read


class GatheredTable(ABC):
    """A table that is not on the device. The rows of a batch are copied there when they are read."""

    index_device = torch.device("cpu")
    items_at_once = STATES_AT_ONCE

    def __init__(self, shapes: list[ViewShape], dtypes: list[torch.dtype], rows: int, device: torch.device) -> None:
        """Take the shape and dtype of each view, the number of rows with padding, and the device to copy to."""
        self.shapes = shapes
        self.dtypes = dtypes
        self.rows = rows
        self.device = device
        self.statistics: Mapping[str, StateStatistics] = {}

    @abstractmethod
    def gather(self, items: Tensor) -> Gathered:
        """Return the rows of item numbers int64 [N] in host memory, pinned for CUDA: a tensor [N, K, D] for each view.

        Padding (0) must stand last.
        """

    def read(self, items: Tensor, gathered: Gathered | None = None) -> list[States]:
        """Return the rows of item numbers int64 [N] on the device, [N, K, D] for each view, in the order of `items`.

        gathered: the result of `gather(items)`; None to gather first.
        """
        gathered = gathered or self.gather(items)
        return [States(rows.to(self.device, non_blocking=True)) for rows in gathered.tensors]

    @abstractmethod
    def close(self) -> None:
        """Close the files that the table reads."""

    def _buffers(self, count: int) -> list[Tensor]:
        """Return an empty tensor [count, K, D] for each view in host memory, pinned for CUDA."""
        pinned = self.device.type == "cuda"
        return [
            torch.empty((count, *shape), dtype=dtype, pin_memory=pinned)
            for shape, dtype in zip(self.shapes, self.dtypes)
        ]


class LocalTable(GatheredTable):
    """A gathered table that has all rows on this machine, and reads those of a batch view after view."""

    def gather(self, items: Tensor) -> Gathered:
        """Return the rows of item numbers int64 [N] in host memory, pinned for CUDA: a tensor [N, K, D] for each view.

        Padding (0) must stand last. Raises InputError if a store cannot give a row.
        """
        buffers = self._buffers(len(items))
        for view, buffer in enumerate(buffers):
            self._read(view, items, buffer)
        return Gathered(buffers)

    @abstractmethod
    def _read(self, view: int, items: Tensor, into: Tensor) -> None:
        """Copy the rows of a view into the tensor `into` [N, K, D], converted to its dtype.

        view: the position of the view. items: item numbers int64 [N] on the host; padding, number 0, stands last and
        gives zeros. Raises InputError if the rows come from a store that lacks or cannot read one.
        """
