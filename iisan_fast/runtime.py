"""The process: how it uses the machine, and what it shows. Nothing here changes what is computed."""

from __future__ import annotations

import ctypes
import logging
import os
import platform

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACE = ":4096:8"  # eight buffers of 4 MiB, with which cuBLAS repeats its results
SPINS = "3000"  # some ten microseconds
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST_THRESHOLD = (1 << 31) - 1  # bytes


def prepare() -> None:
    """Set OpenMP, the memory allocator and cuBLAS up for training. Call it before torch is imported.

    Variables that the environment holds already stay as they are.
    """
    # OpenMP's threads spin while they wait: by default so long that steps become many times slower where other programs
    # want the cores too; without spinning each small product waits for a thread to be woken.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    fix_cublas_workspace()
    # Memory freed by one step is kept for the next. Given back, its pages have to be cleared and mapped again.
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if not libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):
            libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that some versions take
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_THRESHOLD)


def prepare_program() -> None:
    """Prepare the process of a command, and show what the library logs."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("iisan_fast").setLevel(logging.INFO)
    prepare()


def fix_cublas_workspace() -> None:
    """Give cuBLAS a workspace of one size, so that CUDA products repeat bit for bit.

    PyTorch reads the variable at the process's first CUDA product. So whatever may make that product calls this first.
    """
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)
