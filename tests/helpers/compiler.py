"""The C++ compiler: what needs one, and the library compiled before tests begin."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from iisan_fast.kernels.cpu import library


def has_compiler() -> bool:
    """Return True if this machine has a C++ compiler, without compiling anything."""
    try:
        library._compiler()
    except library.NoLibrary:
        return False
    return True


def compile_library() -> None:
    """Compile the library for every dtype, all at the same time, unless the machine's cache has it."""
    if has_compiler():
        with ThreadPoolExecutor() as pool:
            list(pool.map(library.library, library.DTYPES))


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler (c++, g++ or clang++)")
