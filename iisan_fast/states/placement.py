"""Choose where a table of item states or images lies: on the device, in host memory, over all ranks, or in files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from ..config import PLACEMENTS
from ..errors import InputError
from ..ranks import ALONE, Ranks

LOGGER = logging.getLogger(__name__)
DEVICE_SHARE, HOST_SHARE = 0.7, 0.5  # of free memory that a table may take; the model needs the rest
PLACES = ("device", "pinned", "sharded", "mapped")  # the fastest first
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def place(table: str, placement: str, size: int, device: torch.device, mapped: str, ranks: Ranks = ALONE) -> str:
    """Return the place of a table of `size` bytes, one of `PLACES`, and log it.

    table: its name in the log. placement: one of config.PLACEMENTS; "auto" takes the first place with enough free
    memory. mapped: the words in the log for a table that no memory holds. ranks: that place the table together; those
    of one machine share its memory, and all of them take the same place. Raises InputError for an unknown placement, or
    one other than "auto" and "mapped" that does not fit into free memory.
    """
    if placement not in PLACEMENTS:
        raise InputError(f"table: expected one of {', '.join(PLACEMENTS)}, found {placement!r}")
    if placement == "sharded" and not ranks.several:
        placement = "pinned"  # the shard of one rank is the whole table
    room = _Room.of(size, device, ranks)
    place = ranks.all_do(lambda: room.first_fitting() if placement == "auto" else room.checked(placement))
    place = max(ranks.from_all(place), key=PLACES.index)
    homes = {
        "device": f"on {device}",
        "pinned": "in host memory, rows gathered ahead",
        "sharded": f"in the host memory of {ranks.count} ranks, rows exchanged ahead",
        "mapped": mapped,
    }
    free = "" if room.on_device is None else f" ({size_text(room.on_device)} free on {device})"
    LOGGER.info("%s: %s, %s%s", table, size_text(size), homes[place], free)
    return place


class _Room(NamedTuple):
    """The bytes that a rank's part of a table takes, and those that are free for it; None if that is unknown."""

    size: int  # of the whole table
    shard: int  # of this rank's shard, about
    is_sharded: bool  # whether several ranks can hold the table
    on_device: int | None
    on_host: int | None
    of_device: str  # the device's type

    @classmethod
    def of(cls, size: int, device: torch.device, ranks: Ranks) -> _Room:
        """Measure the free memory. Ranks of one machine have equal parts of its host memory."""
        free = free_memory(torch.device("cpu"))
        on_host = None if free is None else free // ranks.on_this_machine
        on_device = on_host if device.type == "cpu" else free_memory(device)
        return cls(size, -(-size // ranks.count), ranks.several, on_device, on_host, device.type)

    def first_fitting(self) -> str:
        """Return the fastest place with enough free memory."""
        if self.on_device is None or self.size <= DEVICE_SHARE * self.on_device:
            return "device"
        if self.on_host is not None:
            if self.of_device == "cuda" and self.size <= HOST_SHARE * self.on_host:
                return "pinned"
            if self.is_sharded and self.shard <= HOST_SHARE * self.on_host:
                return "sharded"
        return "mapped"

    def checked(self, place: str) -> str:
        """Return the place. Raises InputError if it lacks memory."""
        needed = {"sharded": self.shard, "mapped": 0}.get(place, self.size)
        free = self.on_device if place == "device" else self.on_host
        if free is not None and needed > free:
            raise InputError(
                f"table: {place} needs {size_text(needed)}, found {size_text(free)} free; "
                "choose mapped, or leave it to auto"
            )
        return place


def free_memory(device: torch.device) -> int | None:
    """Return a device's free memory in bytes, or the host's within the limit of its control group.

    None if the system does not tell it.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [count for count in (_available(), _granted()) if count is not None]
    return min(known, default=None)


def usable_memory(device: torch.device) -> int | None:
    """Return the share of a device's free memory, in bytes, that one table may take; None if that is unknown."""
    free = free_memory(device)
    share = DEVICE_SHARE if device.type == "cuda" else HOST_SHARE
    return None if free is None else int(share * free)


def _available() -> int | None:
    """Return the bytes that the host can give to a process; None if the system is not Linux."""
    if not MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def _granted() -> int | None:
    """Return the bytes left under the limit of the process's control group (version 2); None if it has none.

    Memory of cached files counts as free.
    """
    limit, used, stat = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return None
    counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    cached = int(counts.get("active_file", 0)) + int(counts.get("inactive_file", 0))
    return max(0, int(limit.read_text()) - int(used.read_text()) + cached)


def size_text(count: int) -> str:
    """Return a number of bytes as text in GiB or MiB, such as "1.5 GiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
