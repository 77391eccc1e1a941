"""The feature table: every item's hidden states, where there is room for them.

On the device, kernels read it by item number. Too large for that, it stays in (pinned) host memory or in the store's
memory-mapped file, and a batch's rows are gathered ahead of the step. The numbers read are the same.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import PLACEMENTS
from .errors import InputError
from .hidden_states import Store
from .kernels import States

LOGGER = logging.getLogger(__name__)
DEVICE_SHARE, HOST_SHARE = 0.7, 0.5  # of the free memory that a table may take; the rest is the model's and others'
ITEMS_AT_ONCE = 4096  # read from the store
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")

ViewShape = tuple[int, int]  # kept layers K, width D


@dataclass(frozen=True)
class FeatureTable:
    """The kept layers of every item on the device, one tensor a view; row 0 is padding and holds zeros."""

    views: tuple[Tensor, ...]  # each [items + 1, K, D]

    @property
    def shapes(self) -> list[ViewShape]:
        """(kept layers K, width D) of each view."""
        return [(view.shape[1], view.shape[2]) for view in self.views]

    @property
    def rows(self) -> int:
        """Items and the padding."""
        return len(self.views[0])

    @property
    def index_device(self) -> torch.device:
        """Where item numbers have to lie."""
        return self.views[0].device

    def gather(self, items: Tensor) -> list[Tensor]:
        """What has to be copied ahead of reading: nothing."""
        return []

    def states(self, items: Tensor) -> list[States]:
        """The views, to be read at item numbers int64 [N] where they lie."""
        return [States(view, items) for view in self.views]

    def close(self) -> None:
        """Gives back what is open."""


class GatheredTable(ABC):
    """A table that the device does not hold: rows are copied there as they are asked for."""

    index_device = torch.device("cpu")

    def __init__(self, shapes: list[ViewShape], dtypes: list[torch.dtype], rows: int, device: torch.device) -> None:
        self.shapes, self.dtypes, self.rows, self.device = shapes, dtypes, rows, device

    def gather(self, items: Tensor) -> list[Tensor]:
        """Rows of item numbers int64 [N], any padding last, in host memory, pinned for CUDA: [N, K, D] a view."""
        buffers = [
            torch.empty((len(items), *shape), dtype=dtype, pin_memory=self.device.type == "cuda")
            for shape, dtype in zip(self.shapes, self.dtypes)
        ]
        for view, buffer in enumerate(buffers):
            self._read(view, items, buffer)
        return buffers

    def states(self, items: Tensor) -> list[States]:
        """The rows on the device, in the order asked for."""
        return [States(rows.to(self.device, non_blocking=True)) for rows in self.gather(items)]

    @abstractmethod
    def close(self) -> None:
        """Gives back what is open."""

    @abstractmethod
    def _read(self, view: int, items: Tensor, into: Tensor) -> None:
        """Fills into [N, K, D] with rows of a view."""


class PinnedTable(GatheredTable):
    """In host memory, pinned where the device is CUDA."""

    def __init__(self, views: tuple[Tensor, ...], device: torch.device) -> None:
        shapes = [(view.shape[1], view.shape[2]) for view in views]
        super().__init__(shapes, [view.dtype for view in views], len(views[0]), device)
        self.views = views

    def close(self) -> None:
        """Nothing is open."""

    def _read(self, view: int, items: Tensor, into: Tensor) -> None:
        torch.index_select(self.views[view], 0, items, out=into)


class MappedTable(GatheredTable):
    """In the store, whose file the system maps into memory as far as it is read."""

    def __init__(
        self, store: Store, names: list[str], item_ids: list[str], dtypes: list[torch.dtype], device: torch.device
    ) -> None:
        made = [store.view(name) for name in names]
        super().__init__([(len(view["layers"]), view["width"]) for view in made], dtypes, len(item_ids) + 1, device)
        self.store, self.names, self.item_ids = store, names, item_ids
        self.stored = [getattr(torch, view["dtype"]) for view in made]
        for name in names:
            store.check(name, item_ids)

    def close(self) -> None:
        """Closes the store."""
        self.store.close()

    def _read(self, view: int, items: Tensor, into: Tensor) -> None:
        own = into if self.stored[view] == into.dtype else torch.empty_like(into, dtype=self.stored[view])
        padding = int((items == 0).sum())  # at the end: a padded batch's
        own[len(items) - padding :] = 0
        ids = [self.item_ids[item - 1] for item in items[: len(items) - padding].tolist()]
        self.store.read(self.names[view], ids, own[: len(ids)])
        if own is not into:
            into.copy_(own)


Table = FeatureTable | PinnedTable | MappedTable


def load_table(
    cache: Path,
    views: Iterable[str],
    item_ids: list[str],
    device: torch.device,
    placement: str = "auto",
    dtype: torch.dtype | None = None,
) -> Table:
    """The named views of a store, in `dtype` (the store's where None), placed where asked or where there is room.

    Raises InputError where states are missing, or where a placement that was asked for does not fit.
    """
    if placement not in PLACEMENTS:
        raise InputError(f"table: expected one of {', '.join(PLACEMENTS)}, found {placement!r}")
    store = Store(cache)
    try:
        names = list(views)
        made = [store.view(name) for name in names]
        dtypes = [dtype or getattr(torch, view["dtype"]) for view in made]
        rows = len(item_ids) + 1
        size = sum(rows * len(view["layers"]) * view["width"] * kind.itemsize for view, kind in zip(made, dtypes))
        where = _place(placement, size, device)
        if where == "mapped":
            return MappedTable(store, names, item_ids, dtypes, device)
        target = device if where == "device" else torch.device("cpu")
        pinned = where == "pinned" and device.type == "cuda"
        shapes = [(rows, len(view["layers"]), view["width"]) for view in made]
        tables = tuple(
            _load(store, name, item_ids, torch.zeros(shape, dtype=kind, device=target, pin_memory=pinned))
            for name, shape, kind in zip(names, shapes, dtypes)
        )
    except BaseException:
        store.close()
        raise
    store.close()
    return FeatureTable(tables) if where == "device" else PinnedTable(tables, device)


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a device, as far as the system tells; of the host, no more than its control group grants."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [count for count in (_available(), _granted()) if count is not None]
    return min(known, default=None)


def _place(placement: str, size: int, device: torch.device) -> str:
    """Where a table of so many bytes goes; says so."""
    on_device, on_host = free_memory(device), free_memory(torch.device("cpu"))
    if placement == "auto":
        if on_device is None or size <= DEVICE_SHARE * on_device:
            placement = "device"
        elif device.type == "cuda" and on_host is not None and size <= HOST_SHARE * on_host:
            placement = "pinned"
        else:
            placement = "mapped"
    elif placement != "mapped":
        free = on_device if placement == "device" else on_host
        if free is not None and size > free:
            raise InputError(
                f"table: {placement} needs {_size(size)}, found {_size(free)} free; choose mapped, or leave it to auto"
            )
    home = {"device": f"on {device}", "pinned": "in host memory, rows gathered ahead", "mapped": "in the store's file"}
    room = "" if on_device is None else f" ({_size(on_device)} free on {device})"
    LOGGER.info("feature table: %s, %s%s", _size(size), home[placement], room)
    return placement


def _load(store: Store, name: str, item_ids: list[str], table: Tensor) -> Tensor:
    """Fills rows 1 and on from the store, a part at a time."""
    stored = getattr(torch, store.view(name)["dtype"])
    staging = torch.empty((min(ITEMS_AT_ONCE, len(item_ids)), *table.shape[1:]), dtype=stored)
    for start in range(0, len(item_ids), ITEMS_AT_ONCE):
        part = item_ids[start : start + ITEMS_AT_ONCE]
        store.read(name, part, staging[: len(part)])
        table[1 + start : 1 + start + len(part)] = staging[: len(part)]
    return table


def _available() -> int | None:
    if not MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def _granted() -> int | None:
    """What the process's control group leaves of its limit, where there is one (version 2). Cached files can go."""
    limit, used, stat = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    cached = int(counts.get("active_file", 0)) + int(counts.get("inactive_file", 0))
    return max(0, int(limit.read_text()) - int(used.read_text()) + cached)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
