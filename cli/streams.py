"""Make standard output and standard error safe to write on, whatever they are connected to."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ESCAPED = "backslashreplace"  # a character that the terminal lacks is printed as its escape
BROKEN_PIPE = 141  # the exit code of a program that SIGPIPE ends


class LastingFile(io.FileIO):
    """A file for messages. Text that cannot be written is dropped, so that a full disk or a closed pipe stops no work.

    Standard error is where an error would be reported, so there is no other place to report this one.
    """

    def write(self, content: Any) -> int:
        """Write bytes and return how many were taken; all of them if the file takes none."""
        size = memoryview(content).nbytes
        try:
            written = super().write(content)
            while written is None:  # the file is non-blocking and busy
                select.select([], [self], [])
                written = super().write(content)
        except OSError:
            return size
        return written


def prepare_streams() -> None:
    """Open closed standard streams to nowhere, and let none of them fail for a character or an unwritable message.

    Otherwise the next file that is opened would take the number of a closed stream, and would receive its text.
    """
    for number in (0, 1, 2):
        _open_if_closed(number)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ESCAPED)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif type(sys.stderr) is io.TextIOWrapper and sys.stderr.fileno() == 2:
        file = io.BufferedWriter(LastingFile(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(file, sys.stderr.encoding, ESCAPED, line_buffering=True)


def discard_output() -> None:
    """Connect standard output to nowhere after it failed, so that the text it still holds is no second error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def only_errors_kept(shows: bool) -> Iterator[int]:
    """Yield the number of a file for lines of errors, and drop all other text during the block, unless `shows`.

    Afterwards standard error is as before, and standard output stays dropped.
    """
    if shows:
        yield 2
        return
    errors = os.dup(2)
    discard_output()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield errors
    finally:
        sys.stderr.flush()
        os.dup2(errors, 2)


def _open_if_closed(number: int) -> None:
    """Open a standard stream's number to nowhere if it is closed; lower numbers have to be open."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
