"""Share a CPU's cores among large pieces of work, instead of one small operator after the other on all of them.

An operator on several threads waits for the slowest of them. If the operator is small, waiting costs more than the
work, and many times more if another program takes a core for a moment.
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

_open: list[int] = []  # of every `in_large_pieces` that is open


def cores() -> int:
    """Return how many threads large pieces of work may use: as many as torch would."""
    return _open[-1] if _open else torch.get_num_threads()


@contextmanager
def in_large_pieces() -> Iterator[None]:
    """Run torch's operators on one thread, and leave the cores to large pieces of work."""
    _open.append(cores())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _open.pop()
        torch.set_num_threads(before)


def at_once(work: Callable[[T], U], parts: Sequence[T], workers: int | None = None) -> list[U]:
    """Return the work's results in the parts' order, without gradients.

    As many workers work as there are cores and parts, or `workers`, if there are cores for them. The calling thread is
    one of them if it owns no extra cores.
    """
    workers = workers or max(1, min(cores(), len(parts)))
    threads, quietly = cores() // workers, torch.no_grad()(work)
    if workers == 1 or not threads or len(parts) <= 1:
        return list(map(quietly, parts))
    most = cores() // threads  # not of this call alone: pools for each number of parts would pile up
    if len(parts) > workers or torch.get_num_threads() != threads:
        futures = [_pool(most, threads).submit(quietly, part) for part in parts]
        wait(futures)  # whatever one of them raises: they use what the caller may free
        return [future.result() for future in futures]
    others = [_pool(most - 1, threads).submit(quietly, part) for part in parts[1:]]
    try:
        first = quietly(parts[0])
    finally:
        wait(others)
    return [first, *(other.result() for other in others)]


def shares(count: int, most: int | None = None) -> list[tuple[int, int]]:
    """Return (start, length) of each worker's rows: equal shares, one a core, at most `most`; fewer if rows are few."""
    return cut(count, max(1, min(cores(), most or cores(), count // LEAST_ROWS)))


def equal_parts(count: int, size: int, most: int | None = None) -> list[slice]:
    """Return equal parts of at most `size` rows, the same number for each worker; workers as in `shares`."""
    workers = len(shares(count, most))
    parts = max(1, -(-count // max(1, size * workers))) * workers
    return [slice(start, start + length) for start, length in cut(count, parts)]


def cut(count: int, parts: int) -> list[tuple[int, int]]:
    """Return (start, length) of equal parts."""
    cuts = [count * i // parts for i in range(parts + 1)]
    return [(start, end - start) for start, end in zip(cuts, cuts[1:])]


@functools.cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Return workers that share the cores evenly."""
    return ThreadPoolExecutor(workers, "iisan-fast", initializer=_settle, initargs=(threads,))


def _settle(threads: int) -> None:
    torch.get_num_threads()  # a thread's first question sets its number anew, to whatever was set last anywhere
    torch.set_num_threads(threads)
