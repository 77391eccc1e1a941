"""The sanitizers of `make sanitize` stop a program that reads or writes outside of its memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import sanitizers
from iisan_fast.kernels.cpu import library

ADD_UP = """
import ctypes, sys
total, part = ((ctypes.c_float * size)() for size in map(int, sys.argv[2:]))
class Sum(ctypes.Structure):
    _fields_ = [("total", ctypes.c_void_p), ("part", ctypes.c_void_p), ("count", ctypes.c_int64)]
call = Sum(ctypes.addressof(total), ctypes.addressof(part), 1000)
print(ctypes.CDLL(sys.argv[1]).add_up(ctypes.byref(call)))
"""


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    """Return the library of `sums.cpp` alone, with the sanitizers."""
    if not shutil.which("c++") or not Path(sanitizers.runtimes().split()[0]).is_absolute():
        pytest.skip("needs a C++ compiler with AddressSanitizer")
    path = tmp_path_factory.mktemp("sanitized") / "sums.so"
    source = library.CPP_FOLDER / "sums.cpp"
    flags = [*library.FLAGS, "-DSCALAR=float", *sanitizers.FLAGS.split()]
    subprocess.run(["c++", *flags, "-shared", str(source), "-o", str(path)], check=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        ((1000, 1000), ""),
        ((1000, 999), "heap-buffer-overflow on address"),
        ((999, 1000), "heap-buffer-overflow on address"),
    ],
)
def test_an_access_past_the_end_is_reported(sizes, error, sums, tmp_path):
    command = [sys.executable, "-c", ADD_UP, str(sums), *map(str, sizes)]
    done = subprocess.run(command, env=sanitizers.environment(tmp_path), capture_output=True, text=True)
    assert (error in done.stderr) and (done.stdout == "0\n") == (not error), done.stderr
    assert not error or "sums.cpp" in done.stderr
