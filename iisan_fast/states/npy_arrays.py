"""Open a .npy file as a memory-mapped array. Pickled objects are never read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import refuse_irregular


def open_npy(path: Path) -> np.ndarray:
    """Return the array of a .npy file, memory-mapped.

    Raises InputError if the file is missing, damaged or shorter than it declares, or holds objects of Python.
    """
    refuse_irregular(path)
    try:
        with path.open("rb") as file:
            beginning = file.read(6)
        if beginning != np.lib.format.MAGIC_PREFIX:
            raise InputError(f"{path}: expected an array that numpy.save wrote, found another file")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, EOFError, SyntaxError, OverflowError, MemoryError, TypeError) as error:
        if "bject" in str(error):  # "Object arrays cannot be loaded …", "Array can't be memory-mapped: Python objects"
            raise InputError(
                f"{path}: holds objects of Python, which are not read because they may run code; save an array of "
                "numbers: numpy.save(FILE, numpy.stack(array).astype('float32'))"
            ) from None
        raise InputError(f"{path}: damaged, or no array of numpy ({_one_line(error)}); save it again") from None


def _one_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
