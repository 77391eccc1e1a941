"""A CPU's cores: large pieces of work side by side, instead of one small operator after the other on all of them.

An operator on several threads waits for the slowest of them each time, which costs more than the operator where it is
small, and many times more where a core is lent to somebody else for a moment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")

LEAST_ROWS = 16  # of a share

_kept: list[int] = []  # the cores of every `in_large_pieces` that is open


def cores() -> int:
    """Threads that large pieces of work may use: as many as torch would."""
    return _kept[-1] if _kept else torch.get_num_threads()


@contextmanager
def in_large_pieces() -> Iterator[None]:
    """Torch's own operators on one thread, for a while; the cores are for those pieces."""
    _kept.append(cores())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _kept.pop()
        torch.set_num_threads(before)


def at_once(work: Callable[[T], U], parts: Sequence[T], workers: int | None = None) -> list[U]:
    """The work's results in the parts' order, without gradients; by so many workers if there are cores for them, or by
    as many as there are cores and parts.

    This thread is one of them where it has no more of the cores than they."""
    workers = workers or max(1, min(cores(), len(parts)))
    threads, quietly = cores() // workers, torch.no_grad()(work)
    if workers == 1 or not threads or len(parts) <= 1:
        return list(map(quietly, parts))
    most = cores() // threads  # not of this call alone: pools for each number of parts would pile up
    if len(parts) > workers or torch.get_num_threads() != threads:
        started = [_pool(most, threads).submit(quietly, part) for part in parts]
        wait(started)  # whatever one of them raises: they use what the caller may free
        return [each.result() for each in started]
    others = [_pool(most - 1, threads).submit(quietly, part) for part in parts[1:]]
    try:
        first = quietly(parts[0])
    finally:
        wait(others)
    return [first, *(other.result() for other in others)]


def shares(count: int, most: int | None = None) -> list[tuple[int, int]]:
    """(start, length) of each worker's rows: equal shares, one a core or at most so many; fewer of few rows."""
    return cut(count, max(1, min(cores(), most or cores(), count // LEAST_ROWS)))


def equal_parts(count: int, size: int, most: int | None = None) -> list[slice]:
    """Equal parts of at most `size` rows, as many for each worker as for the others; workers as in `shares`."""
    workers = len(shares(count, most))
    parts = max(1, -(-count // max(1, size * workers))) * workers
    return [slice(start, start + length) for start, length in cut(count, parts)]


def cut(count: int, parts: int) -> list[tuple[int, int]]:
    """(start, length) of equal parts."""
    cuts = [count * i // parts for i in range(parts + 1)]
    return [(start, end - start) for start, end in zip(cuts, cuts[1:])]


@functools.cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Workers that share the cores evenly."""
    return ThreadPoolExecutor(workers, "iisan-fast", initializer=_settle, initargs=(threads,))


def _settle(threads: int) -> None:
    torch.get_num_threads()  # a thread's first question sets its number anew, to whatever was set last anywhere
    torch.set_num_threads(threads)
