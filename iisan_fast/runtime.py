"""How the process uses the machine; set before the work begins, and never needed for a result."""

from __future__ import annotations

import ctypes
import logging
import os
import platform

SPINS = "3000"  # some ten microseconds
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
MOST_KEPT = (1 << 31) - 1  # bytes


def prepare() -> None:
    """To be called before torch is imported, which reads the environment then. What the library says is shown."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("iisan_fast").setLevel(logging.INFO)
    # OpenMP's threads spin while they wait: by default so long that steps become many times slower where other programs
    # want the cores too; without spinning each small product waits for a thread to be woken.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    # Memory freed by one step is kept for the next. Given back, its pages have to be cleared and mapped again.
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if not libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):
            libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that some versions take
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
