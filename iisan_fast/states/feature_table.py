"""The feature table: every item's hidden states, where there is room for them.

On the device, kernels read it by item number. Too large for that, it stays in (pinned) host memory or in the store's
memory-mapped file, and a batch's rows are gathered ahead of the step. The numbers read are the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels import States
from .item_source import Gathered
from .placement import place
from .store import Store, group_positions
from .view_shapes import ViewShape

ITEMS_AT_ONCE = 4096  # read from the store
STATES_AT_ONCE = 8192  # items whose states are read at a time when all are


@dataclass(frozen=True)
class FeatureTable:
    """The kept layers of every item on the device, one tensor a view; row 0 is padding and holds zeros."""

    views: tuple[Tensor, ...]  # each [items + 1, K, D]
    items_at_once: ClassVar[int] = STATES_AT_ONCE

    @property
    def shapes(self) -> list[ViewShape]:
        """(kept layers K, width D) of each view."""
        return _shapes(self.views)

    @property
    def rows(self) -> int:
        """Items and the padding."""
        return len(self.views[0])

    @property
    def index_device(self) -> torch.device:
        """The device of the item numbers that `read` takes."""
        return self.views[0].device

    def gather(self, items: Tensor) -> Gathered:
        """Gather nothing: the device holds all rows."""
        return Gathered([])

    def read(self, items: Tensor, gathered: Gathered | None = None) -> list[States]:
        """The views, to be read at item numbers int64 [N] where they lie."""
        return [States(view, items) for view in self.views]

    def close(self) -> None:
        """Gives back what is open."""


class GatheredTable(ABC):
    """A table that the device does not hold: rows are copied there as they are asked for."""

    index_device = torch.device("cpu")
    items_at_once = STATES_AT_ONCE

    def __init__(self, shapes: list[ViewShape], dtypes: list[torch.dtype], rows: int, device: torch.device) -> None:
        self.shapes, self.dtypes, self.rows, self.device = shapes, dtypes, rows, device

    def gather(self, items: Tensor) -> Gathered:
        """Rows of item numbers int64 [N], any padding last, in host memory, pinned for CUDA: [N, K, D] a view."""
        buffers = [
            torch.empty((len(items), *shape), dtype=dtype, pin_memory=self.device.type == "cuda")
            for shape, dtype in zip(self.shapes, self.dtypes)
        ]
        for view, buffer in enumerate(buffers):
            self._read(view, items, buffer)
        return Gathered(buffers)

    def read(self, items: Tensor, gathered: Gathered | None = None) -> list[States]:
        """The rows on the device, in the order asked for."""
        gathered = gathered or self.gather(items)
        return [States(rows.to(self.device, non_blocking=True)) for rows in gathered.tensors]

    @abstractmethod
    def close(self) -> None:
        """Gives back what is open."""

    @abstractmethod
    def _read(self, view: int, items: Tensor, into: Tensor) -> None:
        """Fills into [N, K, D] with rows of a view."""


class PinnedTable(GatheredTable):
    """In host memory, pinned where the device is CUDA."""

    def __init__(self, views: tuple[Tensor, ...], device: torch.device) -> None:
        super().__init__(_shapes(views), [view.dtype for view in views], len(views[0]), device)
        self.views = views

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def _read(self, view: int, items: Tensor, into: Tensor) -> None:
        torch.index_select(self.views[view], 0, items, out=into)


class MappedTable(GatheredTable):
    """In the store, whose file the system maps into memory as far as it is read."""

    def __init__(
        self,
        store: Store,
        names: list[str],
        item_ids: list[str],
        positions: list[list[int] | None],
        dtypes: list[torch.dtype],
        device: torch.device,
    ) -> None:
        """positions: among each view's stored layers, the layers to read; None for all."""
        descriptions = [store.view(name) for name in names]
        super().__init__(list(map(_shape, descriptions, positions)), dtypes, len(item_ids) + 1, device)
        self.store, self.names, self.item_ids, self.positions = store, names, item_ids, positions
        self.stored = [getattr(torch, view["dtype"]) for view in descriptions]
        for name in names:
            store.check(name, item_ids)

    def close(self) -> None:
        """Closes the store."""
        self.store.close()

    def _read(self, view: int, items: Tensor, into: Tensor) -> None:
        stored = into if self.stored[view] == into.dtype else torch.empty_like(into, dtype=self.stored[view])
        padding = int((items == 0).sum())  # at the end: a padded batch's
        stored[len(items) - padding :] = 0
        ids = [self.item_ids[item - 1] for item in items[: len(items) - padding].tolist()]
        self.store.read(self.names[view], ids, stored[: len(ids)], self.positions[view])
        if stored is not into:
            into.copy_(stored)


def load_table(
    cache: Path,
    views: Iterable[str],
    item_ids: list[str],
    device: torch.device,
    placement: str = "auto",
    dtype: torch.dtype | None = None,
    layer_groups: int | None = None,
) -> FeatureTable | PinnedTable | MappedTable:
    """The named views of a store, in `dtype` (the store's where None), placed where asked or where there is room.

    `layer_groups` keeps the embedding output and the last block of as many groups of the encoder's blocks. Raises
    InputError where states are missing, or where a placement that was asked for does not fit.
    """
    store = Store(cache)
    try:
        names = list(views)
        descriptions = [store.view(name) for name in names]
        dtypes = [dtype or getattr(torch, view["dtype"]) for view in descriptions]
        positions = [group_positions(name, view, layer_groups) for name, view in zip(names, descriptions)]
        shapes = [(len(item_ids) + 1, *_shape(view, layers)) for view, layers in zip(descriptions, positions)]
        size = sum(math.prod(shape) * kind.itemsize for shape, kind in zip(shapes, dtypes))
        where = place("feature table", placement, size, device, mapped="in the store's file")
        if where == "mapped":
            return MappedTable(store, names, item_ids, positions, dtypes, device)
        target = device if where == "device" else torch.device("cpu")
        pinned = where == "pinned" and device.type == "cuda"
        tables = tuple(
            _load(store, name, item_ids, layers, torch.zeros(shape, dtype=kind, device=target, pin_memory=pinned))
            for name, layers, shape, kind in zip(names, positions, shapes, dtypes)
        )
    except BaseException:
        store.close()
        raise
    store.close()
    return FeatureTable(tables) if where == "device" else PinnedTable(tables, device)


def _shapes(views: tuple[Tensor, ...]) -> list[ViewShape]:
    """Return the shapes of views [items, K, D]."""
    return [ViewShape(view.shape[1], view.shape[2]) for view in views]


def _shape(view: dict[str, Any], positions: list[int] | None) -> ViewShape:
    """Return the shape of a stored view's layers at `positions` (None: of all its layers)."""
    return ViewShape(len(view["layers"] if positions is None else positions), view["width"])


def _load(store: Store, name: str, item_ids: list[str], positions: list[int] | None, table: Tensor) -> Tensor:
    """Fills rows 1 and on from the store, a part at a time."""
    stored = getattr(torch, store.view(name)["dtype"])
    staging = torch.empty((min(ITEMS_AT_ONCE, len(item_ids)), *table.shape[1:]), dtype=stored)
    for start in range(0, len(item_ids), ITEMS_AT_ONCE):
        part = item_ids[start : start + ITEMS_AT_ONCE]
        store.read(name, part, staging[: len(part)], positions)
        table[1 + start : 1 + start + len(part)] = staging[: len(part)]
    return table
