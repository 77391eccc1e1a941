"""Peak memory of a process and its descendants; shared pages count once."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from threading import Event, Thread

PROC = Path("/proc")
EVERY = 0.1  # seconds between two looks; a shorter peak may be missed. A look costs 15 ms for every GiB


class PeakMemory:
    """A context manager whose thread watches the memory of this process and its descendants.

    `bytes` is the largest sum of their proportional set sizes; None if the system does not report them.
    """

    def __init__(self, every: float = EVERY) -> None:
        """Prepare to look at the memory once in so many seconds."""
        self.bytes: int | None = None
        self._every = every
        self._over = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        """Look at the memory at regular times, until the measurement is over; runs in a thread."""
        while not self._over.wait(self._every):
            self._look()

    def _look(self) -> None:
        """Raise the peak if this process and its children take more memory at this moment."""
        now = proportional_set_size(os.getpid())
        if now is not None:
            self.bytes = max(now, self.bytes or 0)


def proportional_set_size(pid: int) -> int | None:
    """Return the bytes of a process and its descendants, or None without /proc.

    A page that n processes share counts 1/n in each.
    """
    if not (PROC / "self" / "smaps_rollup").exists():
        return None
    return sum(_process_size(process) for process in (pid, *descendants(pid)))


def descendants(pid: int) -> list[int]:
    """Return the process ids of all descendants of a process."""
    children = defaultdict(list)
    for folder in PROC.iterdir():
        if folder.name.isdigit() and (status := _read(folder / "stat")):
            parent = status.rpartition(")")[2].split()[1]  # the name before it may hold anything
            children[int(parent)].append(int(folder.name))
    all_descendants: list[int] = []
    waiting = [pid]
    while waiting:
        more = children[waiting.pop()]
        waiting += more
        all_descendants += more
    return all_descendants


def _process_size(pid: int) -> int:
    """Return the proportional set size of a process in bytes; 0 if it has ended."""
    lines = _read(PROC / str(pid) / "smaps_rollup").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _read(file: Path) -> str:
    """Read a file of /proc; "" if its process has ended."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
