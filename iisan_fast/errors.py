"""Define the exceptions for bad input and for stopped work, and make their messages.

A message is one line: where, what was expected, what was found and what to do.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Collection, Iterable
from itertools import islice

LONGEST_MESSAGE = 1500  # characters; data that a message quotes can have any length

OUT_OF_MEMORY = re.compile(  # texts of torch, numpy, the C library and the loader of libraries
    r"DefaultCPUAllocator|can't allocate memory|cannot allocate memory|out of memory|bad_alloc|bad allocation"
    r"|failed to map segment|unable to mmap|not enough memory",
    re.IGNORECASE,
)
OS_ERROR_OF_RUST = re.compile(
    r"(?:\(os error |Os \{ code: )(\d+)"
)  # in errors and panics of polars, safetensors, tokenizers
SPACE_REMEDY = "make room and run again"
REMEDIES = {  # by the errno of an error of the system
    errno.ENOSPC: SPACE_REMEDY,
    errno.EDQUOT: SPACE_REMEDY,
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "check its owner and its permissions",
    errno.EPERM: "check its owner and its permissions",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "it is a link that leads to itself, or may not be followed; replace it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, which hold too many files open",
    errno.EAGAIN: "the limit of processes is reached (ulimit -u); end others, or raise it",
    errno.EIO: "the disk, or the connection to it, fails",
}


class InputError(Exception):
    """Input that cannot be used. The command line prints its message as one line and exits with code 2."""

    def __init__(self, message: str) -> None:
        """Take the message. The middle of a very long one is left out, and its number of characters stands there."""
        if (excess := len(message) - LONGEST_MESSAGE) > 0:
            half = LONGEST_MESSAGE // 2
            message = f"{message[:half]} … {excess:,} characters … {message[-half:]}"
        super().__init__(message)


class Stopped(BaseException):
    """Work that a signal has stopped after it was saved. The command line prints its message as one line.

    Like KeyboardInterrupt it is no Exception, so that a loop that goes on after any Exception stops too.
    The exit code is 128 and the signal's number: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        """Take the message, which says what was saved and how to go on, and the number of the signal."""
        super().__init__(message)
        self.signal_number = signal_number


def error_text(error: Exception) -> str:
    """Return an error's message; for a file that cannot be read or written, its name and the reason."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def system_error_number(error: BaseException) -> int | None:
    """Return the errno of an error of the system, also if a library written in Rust reports it; None for another."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = OS_ERROR_OF_RUST.search(str(error))
    return int(found[1]) if found else None


def with_remedy(text: str, number: int | None) -> str:
    """Add to the text of an error of the system what to do about it, if there is something. number: its errno."""
    return f"{text}; {REMEDIES[number]}" if number in REMEDIES else text


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory was refused: Python's, numpy's, torch's, LMDB's or the system's."""
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "MemoryError"):  # torch's, lmdb's
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (RuntimeError, ImportError)) and OUT_OF_MEMORY.search(str(error)) is not None


def first_few(names: Iterable[object], total: int, limit: int = 3) -> str:
    """Return the first `limit` names and the number of the others, such as "a, b, c and 9 more".

    total: the number of all names.
    """
    shown = ", ".join(str(name) for name in islice(names, limit))
    return f"{shown} and {total - limit} more" if total > limit else shown


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise InputError if the value of the setting `name` is not one of the allowed words."""
    if value not in allowed:
        raise InputError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")


def nearest(name: str, names: Collection[str]) -> str:
    """Return "did you mean …?" with the names spelled most like `name`, or "expected one of …" with all names."""
    similar = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(similar)}?" if similar else f"expected one of {', '.join(names)}"
