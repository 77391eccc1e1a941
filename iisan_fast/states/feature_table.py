"""Hold every item's hidden states in a table: on the device, in host memory, or in the store's memory-mapped file.

On the device, kernels read the table by item number. A larger table stays in (pinned) host memory, in shards on several
ranks, or in the file, and the rows of a batch are copied to the device ahead of its step. All give the same values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import States
from ..ranks import ALONE, Ranks
from .gathered_table import STATES_AT_ONCE, LocalTable
from .item_source import Gathered
from .sharded_table import ShardedTable, shard_items, shard_rows
from .standardise import StateStatistics, state_statistics
from .state_reader import StateReader
from .store import Store
from .table_plan import TablePlan, plan_table, selected_shape
from .view_shapes import ViewShape

ITEMS_AT_ONCE = 4096  # items to read from the store at a time


@dataclass(frozen=True)
class FeatureTable:
    """A table on the device: the selected layers of every item. Row 0 is padding and holds zeros."""

    views: tuple[Tensor, ...]  # [items + 1, layers K, width D] of each view
    statistics: Mapping[str, StateStatistics] = field(default_factory=dict)  # of each view, if it is standardised
    items_at_once: ClassVar[int] = STATES_AT_ONCE

    @property
    def shapes(self) -> list[ViewShape]:
        """Return the shape (layers K, width D) of each view."""
        return _shapes(self.views)

    @property
    def rows(self) -> int:
        """Return the number of rows: the items and the padding."""
        return len(self.views[0])

    @property
    def index_device(self) -> torch.device:
        """Return the device on which `read` takes item numbers."""
        return self.views[0].device

    def gather(self, items: Tensor) -> Gathered:
        """Return an empty result: the device holds all rows already."""
        return Gathered([])

    def read(self, items: Tensor, gathered: Gathered | None = None) -> list[States]:
        """Return each view's table with the item numbers int64 [N], so that a kernel reads the rows in place."""
        return [States(view, items) for view in self.views]

    def close(self) -> None:
        """Do nothing: the table keeps no files open."""


class PinnedTable(LocalTable):
    """A table in host memory, which is pinned if the device is CUDA."""

    def __init__(
        self, views: tuple[Tensor, ...], device: torch.device, statistics: Mapping[str, StateStatistics] | None = None
    ) -> None:
        """Take the tensors [items + 1, K, D] of the views, and the device that rows are copied to.

        statistics: with which each view was standardised; None if it was not.
        """
        super().__init__(_shapes(views), [view.dtype for view in views], len(views[0]), device)
        self.views = views
        self.statistics = statistics or {}

    def close(self) -> None:
        """Do nothing: the table keeps no files open."""

    def _read(self, view: int, items: Tensor, into: Tensor) -> None:
        """Copy the rows from host memory."""
        torch.index_select(self.views[view], 0, items, out=into)


class MappedTable(LocalTable):
    """A table in the store's file. The operating system maps into memory what is read."""

    def __init__(
        self,
        store: StateReader,
        names: list[str],
        item_ids: list[str],
        positions: list[list[int] | None],
        dtypes: list[torch.dtype],
        device: torch.device,
    ) -> None:
        """Read the views `names` of a store, for the items in the order of `item_ids`.

        positions: for each view, the positions of the layers to read among its stored layers; None for all of them.
        dtypes: of the rows that are read. Raises InputError if states are missing.
        """
        descriptions = [store.view(name) for name in names]
        super().__init__(list(map(selected_shape, descriptions, positions)), dtypes, len(item_ids) + 1, device)
        self.store = store
        self.names = names
        self.item_ids = item_ids
        self.positions = positions
        self.stored = [getattr(torch, view["dtype"]) for view in descriptions]
        for name in names:
            store.check(name, item_ids)

    def standardise(self) -> None:
        """Standardise all rows from now on, as they are read. All states are read once for the statistics.

        Raises InputError if the store cannot give a row, or if a number is not finite.
        """
        statistics = {}
        for name, positions, dtype in zip(self.names, self.positions, self.dtypes):
            parts = (rows for _, rows in _parts(self.store, name, self.item_ids, positions))
            statistics[name] = state_statistics(parts, dtype, self.store.where(name))
        self.statistics = statistics

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _read(self, view: int, items: Tensor, into: Tensor) -> None:
        """Copy the rows of a view from the store into `into` [N, K, D], converted to its dtype; zeros for padding.

        items: item numbers int64 [N] on the host, padding last. Raises InputError if the store cannot give a row.
        """
        stored = into if self.stored[view] == into.dtype else torch.empty_like(into, dtype=self.stored[view])
        padding = int((items == 0).sum())  # padding stands last
        stored[len(items) - padding :] = 0
        ids = [self.item_ids[item - 1] for item in items[: len(items) - padding].tolist()]
        self.store.read(self.names[view], ids, stored[: len(ids)], self.positions[view])
        if stored is not into:
            into.copy_(stored)
        if statistics := self.statistics.get(self.names[view]):
            statistics.standardise(into[: len(ids)])


def load_table(
    cache: Path | StateReader,
    views: Iterable[str],
    item_ids: list[str],
    device: torch.device,
    placement: str = "auto",
    dtype: torch.dtype | None = None,
    layer_groups: int | None = None,
    standardise: bool = False,
    ranks: Ranks = ALONE,
) -> FeatureTable | PinnedTable | MappedTable | ShardedTable:
    """Load views of a store into a table for the items in the order of `item_ids`. Item numbers count from 1.

    cache: the store's folder, or states that are open for reading, which the table then closes. placement: one of
    config.PLACEMENTS; "auto" chooses by free memory. dtype: of the table; None for the store's. layer_groups: keep the
    embedding output and the last block of that many groups of the encoder's blocks; None keeps all stored layers.
    standardise: give each number of a layer mean 0 and deviation 1 over the items, in the table itself or, for a mapped
    one, as rows are read. ranks: that load the table together. Raises InputError, on all of them, if the store, a view,
    a layer or an item's states are missing or damaged, or if the placement does not fit.
    """
    store = Store(cache) if isinstance(cache, Path) else cache
    try:
        plan = plan_table(store, views, item_ids, device, placement, dtype, layer_groups, ranks)
        if plan.place == "sharded":
            table = _load_shards(store, plan, item_ids, device, standardise, ranks)
        else:
            table = ranks.all_do(lambda: _load_whole(store, plan, item_ids, device, standardise))
    except BaseException:
        store.close()
        raise
    if not isinstance(table, MappedTable):
        store.close()
    return table


def unread_table(
    cache: Path | StateReader,
    views: Iterable[str],
    item_ids: list[str],
    device: torch.device,
    placement: str = "auto",
    dtype: torch.dtype | None = None,
    layer_groups: int | None = None,
) -> tuple[MappedTable, TablePlan]:
    """Return the table of `load_table` in the store's file, and a plan with the place where `load_table` puts it.

    No states are read. Raises InputError as `load_table` does.
    """
    store = Store(cache) if isinstance(cache, Path) else cache
    try:
        plan = plan_table(store, views, item_ids, device, placement, dtype, layer_groups)
        return MappedTable(store, plan.names, item_ids, plan.positions, plan.dtypes, device), plan
    except BaseException:
        store.close()
        raise


def final_states(store: StateReader, views: Iterable[str], item_ids: list[str]) -> MappedTable:
    """Return a table of the last stored layer of each view, [items + 1, 1, D], in the store's file and dtype.

    It is read on the CPU, and closes the store. Raises InputError if a view or an item's states are missing.
    """
    names = list(views)
    descriptions = [store.view(name) for name in names]
    last: list[list[int] | None] = [[len(view["layers"]) - 1] for view in descriptions]
    dtypes = [getattr(torch, view["dtype"]) for view in descriptions]
    return MappedTable(store, names, item_ids, last, dtypes, torch.device("cpu"))


def _load_whole(
    store: StateReader, plan: TablePlan, item_ids: list[str], device: torch.device, standardise: bool
) -> FeatureTable | PinnedTable | MappedTable:
    """Load the table of a plan that is not sharded. Raises InputError as `load_table` does."""
    if plan.place == "mapped":
        table = MappedTable(store, plan.names, item_ids, plan.positions, plan.dtypes, device)
        if standardise:
            table.standardise()
        return table
    target = device if plan.place == "device" else torch.device("cpu")
    pinned = plan.place == "pinned" and device.type == "cuda"
    tables = _zeros(plan, len(item_ids) + 1, target, pinned)
    statistics = {}
    for name, layers, view in zip(plan.names, plan.positions, tables):
        parts = _loaded(store, name, item_ids, layers, view[1:])
        if standardise:
            statistics[name] = state_statistics(parts, view.dtype, store.where(name))
            statistics[name].standardise(view[1:])
        else:
            _exhaust(parts)
    if plan.place == "device":
        return FeatureTable(tables, statistics)
    return PinnedTable(tables, device, statistics)


def _load_shards(
    store: StateReader, plan: TablePlan, item_ids: list[str], device: torch.device, standardise: bool, ranks: Ranks
) -> ShardedTable:
    """Load this rank's shard of a table, and no other states. Raises InputError, on all ranks, as `load_table` does."""

    def load() -> tuple[Tensor, ...]:
        tables = _zeros(plan, shard_rows(len(item_ids), ranks), torch.device("cpu"), device.type == "cuda")
        ids = [item_ids[item - 1] for item in shard_items(len(item_ids), ranks).tolist()]
        for name, layers, view in zip(plan.names, plan.positions, tables):
            _exhaust(_loaded(store, name, ids, layers, view[len(view) - len(ids) :]))
        return tables

    table = ShardedTable(ranks.all_do(load), len(item_ids), device, ranks)
    if standardise:
        table.standardise(plan.names, [store.where(name) for name in plan.names])
    return table


def _zeros(plan: TablePlan, rows: int, device: torch.device, pinned: bool) -> tuple[Tensor, ...]:
    """Return tensors of zeros [rows, K, D] for the views of a plan."""
    return tuple(
        torch.zeros(rows, *shape[1:], dtype=dtype, device=device, pin_memory=pinned)
        for shape, dtype in zip(plan.shapes, plan.dtypes)
    )


def _exhaust(parts: Iterator[Tensor]) -> None:
    """Take all parts of an iterator that is read for its effect."""
    for _ in parts:
        pass


def _shapes(views: tuple[Tensor, ...]) -> list[ViewShape]:
    """Return the shapes (K, D) of tensors [items, K, D]."""
    return [ViewShape(view.shape[1], view.shape[2]) for view in views]


def _loaded(
    store: StateReader, name: str, item_ids: list[str], positions: list[int] | None, table: Tensor
) -> Iterator[Tensor]:
    """Fill a table [items, K, D] from the store, and yield the states of each part."""
    for start, rows in _parts(store, name, item_ids, positions):
        table[start : start + len(rows)] = rows
        yield rows


def _parts(
    store: StateReader, name: str, item_ids: list[str], positions: list[int] | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield the states of all items in parts: the first item's place, and states [N, K, D], which the next overwrites.

    Raises InputError if the store cannot give a row.
    """
    view = store.view(name)
    size = min(ITEMS_AT_ONCE, len(item_ids))
    staging = torch.empty((size, *selected_shape(view, positions)), dtype=getattr(torch, view["dtype"]))
    for start in range(0, len(item_ids), ITEMS_AT_ONCE):
        part = item_ids[start : start + ITEMS_AT_ONCE]
        with store.read_ahead():
            store.read(name, part, staging[: len(part)], positions)
        yield start, staging[: len(part)]
