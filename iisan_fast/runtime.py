"""Set up the process: OpenMP, the memory allocator, cuBLAS and logging. No setting changes a result."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
import warnings

from .launcher import is_one_of_several
from .printable import printable

OPENBLAS_VARIABLE = "OPENBLAS_NUM_THREADS"  # numpy's and scipy's, which multiply nothing here; its threads need memory
CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACE = ":4096:8"  # eight buffers of 4 MiB, with which cuBLAS repeats its results
TORCH_LOG_VARIABLE = "TORCH_CPP_LOG_LEVEL"  # of the log of torch's C++
SPINS = "3000"  # some ten microseconds
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST_THRESHOLD = (1 << 31) - 1  # bytes


class PrintableFormatter(logging.Formatter):
    """Print a message alone, its control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's message, safe to print."""
        return printable(super().format(record))


def prepare() -> None:
    """Set OpenMP, the memory allocator and cuBLAS up for training, as the command does.

    Call it before torch is imported; later it warns that OpenMP's threads wait as before. Variables that are set in the
    environment stay as they are.
    """
    # OpenMP's threads spin while they wait: by default so long that steps become many times slower where other programs
    # want the cores too; without spinning each small product waits for a thread to be woken.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
        if "torch" in sys.modules:
            message = "prepare: torch is imported already, so its threads wait as before; call prepare first"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    os.environ.setdefault(OPENBLAS_VARIABLE, "1")
    if is_one_of_several():
        os.environ.setdefault(TORCH_LOG_VARIABLE, "FATAL")  # a rank's errors are reported once, by an exception
    fix_cublas_workspace()
    # Memory freed by one step is kept for the next. Given back, its pages have to be cleared and mapped again.
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if not libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):
            libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that some versions take
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_THRESHOLD)


def prepare_program() -> None:
    """Prepare the process of a command, and show what the library logs."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("iisan_fast").setLevel(logging.INFO)
    prepare()


def fix_cublas_workspace() -> None:
    """Give cuBLAS a workspace of one size, so that CUDA products repeat bit for bit.

    PyTorch reads the variable at the process's first CUDA product. So every function that may make it calls this first.
    """
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)
