"""Call the C++ library's functions: one on the calling thread, or a schedule of calls on all cores."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..threads import cores
from .library import library
from .structs import CallStruct

NO_MEMORY, WRONG_SIZES = 1, 2  # codes, as in cpp/entry.h


def run(function: Callable[..., int], arguments: ctypes.Structure) -> None:
    """Call a C++ function on the calling thread.

    Raises MemoryError if it cannot allocate memory, ValueError if the sizes in its arguments do not fit together.
    """
    if code := function(ctypes.byref(arguments)):
        raise _failure(code, _name(function), arguments)


def wrong_sizes(name: str, arguments: ctypes.Structure) -> ValueError:
    """Return the ValueError for a C++ function `name` that refuses the sizes in its arguments."""
    whole = (ctypes.c_int32, ctypes.c_int64)
    sizes = [f"{field} {getattr(arguments, field)}" for field, kind in arguments._fields_ if kind in whole]
    return ValueError(f"{name} in C++: expected sizes that fit, found {', '.join(sizes)}")


class Span(NamedTuple):
    """A range of the calls of a schedule."""

    first: int  # number of the first call
    last: int  # one more than the number of the last call

    def to(self, other: Span) -> Span:
        """Return the smallest range that includes both."""
        return Span(min(self.first, other.first), max(self.last, other.last))


AT_ONCE = Span(0, 0)  # the empty range: a call after it waits for no other


class Schedule:
    """A list of C++ calls; a call may wait for earlier calls. The numbers of the calls go on from run to run."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Create an empty schedule for the library of a dtype."""
        self._dtype = dtype
        self._ended = 0  # number of calls in earlier runs
        self.drop()

    def add(self, function: Callable[..., int], arguments: Sequence[ctypes.Structure], after: Span = AT_ONCE) -> Span:
        """Add a call of a function for each of the arguments; they wait for the calls `after`. Return their range."""
        work = ctypes.cast(function, ctypes.c_void_p).value
        before = len(self._calls)
        first, last = (max(0, number - self._ended) for number in after)  # calls of earlier runs have ended
        self._calls += [(work, ctypes.addressof(struct), first, last) for struct in arguments]
        self._arguments += arguments  # references, so that they live until the calls have ended
        self._names += [_name(function)] * len(arguments)
        return Span(self._ended + before, self._ended + before + len(arguments))

    def drop(self) -> None:
        """Forget the calls that were added since the last run."""
        self._calls: list[tuple[int | None, int, int, int]] = []
        self._arguments: list[ctypes.Structure] = []
        self._names: list[str] = []

    def run(self, threads: int | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Make all calls and wait for them; afterwards the schedule is empty.

        Args:
            threads: number of threads, the calling one included; None for one on each core.
            meanwhile: called while the other threads work; the calling thread joins them after it. Calls that it adds
                belong to the next run.

        A thread takes the next call in order as soon as it is free. Raises MemoryError if a call cannot allocate
        memory, ValueError if one refuses its sizes.
        """
        compiled = library(self._dtype)
        calls = (CallStruct * len(self._calls))(*self._calls)
        arguments = self._arguments
        names = self._names
        self._ended += len(calls)
        self.drop()
        running = ctypes.c_void_p()
        try:
            if code := compiled.begin(calls, len(calls), threads or cores(), ctypes.byref(running)):
                raise _failure(code, "begin", calls[0] if len(calls) else CallStruct())
            meanwhile()
        finally:  # even after an error: other threads may still read the calls' memory
            failure = compiled.end(running)
        if failure:
            number, code = failure >> 8, failure & 0xFF
            raise _failure(code, names[number], arguments[number])


def share_out(
    function: Callable[..., int], calls: Sequence[ctypes.Structure], dtype: torch.dtype, threads: int | None = None
) -> None:
    """Call a C++ function on each of the arguments in parallel and wait for all.

    Takes threads, and raises, as `Schedule.run` does.
    """
    schedule = Schedule(dtype)
    schedule.add(function, calls)
    schedule.run(threads)


def _failure(code: int, name: str, arguments: ctypes.Structure) -> Exception:
    """Return the exception for a code that a C++ function returned."""
    if code == WRONG_SIZES:
        return wrong_sizes(name, arguments)
    return MemoryError(f"{name} in C++ lacks memory for this batch")


def _name(function: Callable[..., int]) -> str:
    """Return the name of a C++ function."""
    return getattr(function, "__name__", "a function")
