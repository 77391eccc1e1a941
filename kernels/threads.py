"""Run large pieces of work in parallel, one on each core, instead of each small operator on all cores.

An operator on several threads waits for the slowest of them. If the operator is small, the wait costs more than the
work, and far more if another program takes a core for a moment.
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

LEAST_ROWS = 16  # rows of a share, at least

_open: list[int] = []  # number of cores of each `in_large_pieces` that has been entered and not left


def cores() -> int:
    """Return the number of threads for large pieces of work: torch's number of threads outside `in_large_pieces`."""
    return _open[-1] if _open else torch.get_num_threads()


@contextmanager
def in_large_pieces() -> Iterator[None]:
    """Run torch's operators on one thread in the block, so that `at_once` can use all cores for its parts."""
    _open.append(cores())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _open.pop()
        torch.set_num_threads(before)


def at_once(work: Callable[[T], U], parts: Sequence[T], workers: int | None = None) -> list[U]:
    """Return [work(part) for part in parts], computed in parallel threads without gradients.

    Args:
        work: called once for each part; several threads call it at the same time.
        parts: its arguments.
        workers: number of threads; None for as many as there are cores and parts. With more workers than cores, all
            parts run in the calling thread.

    Each thread gets an equal number of cores for torch's operators. If the calling thread has that number too and there
    are no more parts than workers, it computes the first part itself. Raises the exception of the first part that
    raised one, after all parts have ended.
    """
    workers = workers or max(1, min(cores(), len(parts)))
    threads = cores() // workers
    quietly = torch.no_grad()(work)
    if workers == 1 or not threads or len(parts) <= 1:
        return list(map(quietly, parts))
    most = cores() // threads  # independent of the number of parts, so that the cached pools stay few
    if len(parts) > workers or torch.get_num_threads() != threads:
        futures = [_pool(most, threads).submit(quietly, part) for part in parts]
        wait(futures)  # even if one raises: the others still use memory that the caller may free
        return [future.result() for future in futures]
    others = [_pool(most - 1, threads).submit(quietly, part) for part in parts[1:]]
    try:
        first = quietly(parts[0])
    finally:
        wait(others)
    return [first, *(other.result() for other in others)]


def shares(count: int, most: int | None = None) -> list[tuple[int, int]]:
    """Cut `count` rows into equal shares, one for each core; return the (start, length) of each.

    There are at most `most` shares, and fewer if shares would have less than `LEAST_ROWS` rows, but at least one.
    """
    return cut(count, max(1, min(cores(), most or cores(), count // LEAST_ROWS)))


def equal_parts(count: int, size: int, most: int | None = None) -> list[slice]:
    """Cut `count` rows into equal slices of at most `size` rows; their number is a multiple of that of `shares`."""
    workers = len(shares(count, most))
    parts = max(1, -(-count // max(1, size * workers))) * workers
    return [slice(start, start + length) for start, length in cut(count, parts)]


def cut(count: int, parts: int) -> list[tuple[int, int]]:
    """Cut `count` rows into `parts` parts of nearly equal size; return the (start, length) of each."""
    cuts = [count * i // parts for i in range(parts + 1)]
    return [(start, end - start) for start, end in zip(cuts, cuts[1:])]


@functools.cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Return the pool of `workers` threads in which torch uses `threads` threads; each pool is made once."""
    return ThreadPoolExecutor(workers, "iisan-fast", initializer=_settle, initargs=(threads,))


def _settle(threads: int) -> None:
    """Set torch's number of threads in the calling thread."""
    torch.get_num_threads()  # the first call in a thread resets its number to the process's, so it must come first
    torch.set_num_threads(threads)
