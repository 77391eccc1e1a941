"""Peak memory of a process and all that it started, shared pages counted once."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from threading import Event, Thread

PROC = Path("/proc")
EVERY = 0.1  # seconds between two looks; a shorter peak may be missed. A look costs 15 ms for every GiB


class PeakMemory:
    """Watches, as a context manager, this process and its descendants from a thread of its own.

    `bytes` is the largest sum seen of their proportional set sizes; None where the system does not tell them.
    """

    def __init__(self, every: float = EVERY) -> None:
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
        while not self._over.wait(self._every):
            self._look()

    def _look(self) -> None:
        now = proportional_set_size(os.getpid())
        if now is not None:
            self.bytes = max(now, self.bytes or 0)


def proportional_set_size(pid: int) -> int | None:
    """Bytes of a process and its descendants, a page that n processes share counted 1/n in each; None without /proc."""
    if not (PROC / "self" / "smaps_rollup").exists():
        return None
    return sum(_own_size(each) for each in (pid, *descendants(pid)))


def descendants(pid: int) -> list[int]:
    """All processes that stem from one."""
    children = defaultdict(list)
    for folder in PROC.iterdir():
        if folder.name.isdigit() and (status := _read(folder / "stat")):
            parent = status.rpartition(")")[2].split()[1]  # the name before it may hold anything
            children[int(parent)].append(int(folder.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        waiting += (more := children[waiting.pop()])
        found += more
    return found


def _own_size(pid: int) -> int:
    lines = _read(PROC / str(pid) / "smaps_rollup").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _read(file: Path) -> str:
    """Nothing where the process has ended meanwhile."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
