"""Calls in worker processes, ahead of their use: files are read and decoded while an encoder computes.

Workers are forked from a fork server, never from this process, since threads (of torch or a tokenizer) and open
databases do not survive a fork. A worker computes with one thread. It does not import the main module, since a script
would then run again in every worker.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from threading import Thread
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .errors import InputError
from .stop_signals import STOP_SIGNALS

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext  # which Windows lacks

MAX_WORKERS = 16  # limit of the default
ITEMS_A_WORKER = 2000  # for fewer items, a worker takes longer to start than it saves
CHECKED_AT_ONCE = 64  # items a call, when a catalogue is checked
ONE_LINE = (InputError, OSError, MemoryError)  # errors that the program shows as one line, without a traceback

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def worker_count(asked: int | None, items: int, device: torch.device) -> int:
    """Return the number of worker processes: `asked`, or a default if that is None.

    The default is one worker for every CPU that an encoder on `device` leaves idle, at most MAX_WORKERS, and at most
    one for ITEMS_A_WORKER items.
    """
    if asked is not None:
        return asked
    idle = usable_cpus() - (torch.get_num_threads() if device.type == "cpu" else 1)
    return min(max(0, idle), MAX_WORKERS, items // ITEMS_A_WORKER)


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def calls_ahead(
    function: Callable[[Argument], Result],
    arguments: Sequence[Argument],
    workers: int,
    pin: bool = False,
    modules: Sequence[str] = (),
) -> Iterator[Result]:
    """Yield function(argument) for every argument, in order.

    `workers` processes work ahead; with 0 this process does the work itself. Function, arguments and results must be
    picklable. `pin` puts results that have `pin_memory` into pinned memory. `modules` are imported once, by the fork
    server, before the first worker of this process is forked. Close the iterator to end the workers early.

    Raises the function's InputError, OSError or MemoryError unchanged, and InputError if a worker process fails
    otherwise.
    """
    if not arguments:
        return
    loader = DataLoader(
        _Calls(function),
        batch_size=None,
        sampler=arguments,
        collate_fn=_unchanged,
        num_workers=workers,
        multiprocessing_context=_context(modules) if workers else None,
        worker_init_fn=_end_with_parent,
        pin_memory=pin,
        generator=torch.Generator(),  # DataLoader draws seeds from it, not from the global generator
    )
    results = _start(loader)
    try:
        for _ in arguments:
            result = next(results)
            if isinstance(result, ONE_LINE):
                raise result
            yield result
    except RuntimeError as error:  # of DataLoader: a worker was killed or ran out of shared memory
        if not workers:
            raise
        reason = str(error).splitlines()[0]
    else:
        return
    finally:
        del results  # ends the workers; an error that is kept would keep this frame and them
    raise InputError(f"a worker process failed ({reason}); run again with fewer workers, or 0")


def batched(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Split rows into parts of `size`; the last one may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class _Calls(Dataset, Generic[Argument, Result]):
    """The calls as a dataset. It returns errors of ONE_LINE, since DataLoader would put a traceback into their text."""

    def __init__(self, function: Callable[[Argument], Result]) -> None:
        """Take the function that `calls_ahead` calls."""
        self.function = function

    def __getitem__(self, argument: Argument) -> Result | Exception:
        """Return function(argument), or its error if that is one of ONE_LINE."""
        try:
            return self.function(argument)
        except ONE_LINE as error:
            return error


def _unchanged(result: Any) -> Any:
    """Return the result itself: nothing is collated."""
    return result


def _context(modules: Sequence[str]) -> ForkServerContext:
    """Return a multiprocessing context whose fork server imports `modules` before it forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def _start(loader: DataLoader) -> Iterator[Any]:
    """Start the workers with the stop signals blocked, which they inherit: only this process acts upon Ctrl-C.

    A terminal and `timeout` signal the whole group of processes. Workers end when this process closes them or ends.
    """
    resource_tracker.ensure_running()  # otherwise it would start below, and unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        with _main_module_hidden():
            return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Hide the origin of the main module during the block, so that new processes do not import it.

    They need it not: no function that they call belongs to it.
    """
    main = vars(sys.modules["__main__"])
    origin = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.update(dict.fromkeys(origin))
    try:
        yield
    finally:
        main.update(origin)


def _end_with_parent(_worker: int) -> None:
    """End this worker as soon as the process that started it has ended, even if that was killed.

    DataLoader watches the fork server instead, which lives as long as any worker does.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
