"""Watch the private memory of a process: what it cannot give back to the system, unlike pages of files."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread

PROC = Path("/proc")
PRIVATE = ("RssAnon", "RssShmem")  # heaps, stacks and anonymous maps; anonymous memory that processes share
FILES = "RssFile"  # resident pages of files: code, and what is read by memory maps
EVERY = 0.02  # seconds between two looks; a shorter peak may be missed


class PrivateMemory:
    """A context manager whose thread reads a process's status in /proc, and keeps the largest sizes.

    `peak` is the largest sum of the lines RssAnon and RssShmem, and `files` the largest RssFile, in bytes; None if the
    system does not report them.
    """

    def __init__(self, process: int | None = None) -> None:
        """Prepare to watch a process by its id; None: this one."""
        self._status = PROC / ("self" if process is None else str(process)) / "status"
        self.peak: int | None = None
        self.files: int | None = None
        self._over = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PrivateMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        """Look at regular times until the context ends; runs in a thread."""
        while not self._over.wait(EVERY):
            self._look()

    def _look(self) -> None:
        """Raise the peaks if the process has more memory now."""
        sizes = resident_sizes(self._status)
        if FILES in sizes:
            self.peak = max(self.peak or 0, sum(sizes[name] for name in PRIVATE))
            self.files = max(self.files or 0, sizes[FILES])


def resident_sizes(status: Path) -> dict[str, int]:
    """Return the lines of a process's status that begin with Rss, in bytes; empty if it has ended or has no such file.

    status: the file in /proc.
    """
    try:
        text = status.read_text()
    except OSError:
        return {}
    lines = (line.split(":") for line in text.splitlines() if line.startswith("Rss"))
    return {name: int(size.split()[0]) << 10 for name, size in lines}
