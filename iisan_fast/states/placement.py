"""Choose where a table of item states or images lies: on the device, in host memory, or in files."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ..config import PLACEMENTS
from ..errors import InputError

LOGGER = logging.getLogger(__name__)
DEVICE_SHARE, HOST_SHARE = 0.7, 0.5  # of free memory that a table may take; the model needs the rest
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def place(table: str, placement: str, size: int, device: torch.device, mapped: str) -> str:
    """Return the place of a table of `size` bytes: "device", "pinned" or "mapped", and log it.

    table: its name in the log. placement: one of config.PLACEMENTS; "auto" takes the first place with enough free
    memory. mapped: the words in the log for a table that no memory holds. Raises InputError for an unknown placement,
    or one other than "auto" and "mapped" that does not fit into free memory.
    """
    if placement not in PLACEMENTS:
        raise InputError(f"table: expected one of {', '.join(PLACEMENTS)}, found {placement!r}")
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
                f"table: {placement} needs {size_text(size)}, found {size_text(free)} free; "
                "choose mapped, or leave it to auto"
            )
    home = {"device": f"on {device}", "pinned": "in host memory, rows gathered ahead", "mapped": mapped}
    room = "" if on_device is None else f" ({size_text(on_device)} free on {device})"
    LOGGER.info("%s: %s, %s%s", table, size_text(size), home[placement], room)
    return placement


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
