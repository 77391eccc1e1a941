"""Calls in worker processes, made ahead of their use: what is read and decoded while an encoder computes.

Workers are forked from a fork server, never from this process: its threads (torch's, a tokenizer's) and its open
databases would not survive that. They compute with one thread each, and do not import the main module: a script would
begin again in each of them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext
from threading import Thread
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .errors import InputError

MAX_WORKERS = 16  # that nobody asked for
ITEMS_A_WORKER = 2000  # below that, starting one takes longer than it saves
CHECKED_AT_ONCE = 64  # items a call, where a catalogue is looked through
ONE_LINE = (InputError, OSError, MemoryError)  # what the program answers with a line and no traceback

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def worker_count(asked: int | None, items: int, device: torch.device) -> int:
    """What was asked for; of None, one for every CPU that an encoder on the device leaves idle, fewer for few items."""
    if asked is not None:
        return asked
    idle = usable_cpus() - (torch.get_num_threads() if device.type == "cpu" else 1)
    return min(max(0, idle), MAX_WORKERS, items // ITEMS_A_WORKER)


def usable_cpus() -> int:
    """CPUs that this process may run on."""
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
    picklable. `pin` puts results that have `pin_memory` into pinned memory. `modules` are imported once for all worker
    processes, by the server that the first of them are forked from. Close the iterator to end the workers early.

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
        generator=torch.Generator(),  # it draws seeds for its workers, which the global generator must not feel
    )
    results = _start(loader)
    try:
        for _ in arguments:
            result = next(results)
            if isinstance(result, ONE_LINE):
                raise result
            yield result
    except RuntimeError as error:  # DataLoader's, for a worker that was killed or ran out of shared memory
        if not workers:
            raise
        reason = str(error).splitlines()[0]
    else:
        return
    finally:
        del results  # which ends the workers; an error would keep it, with this frame, for as long as it is looked at
    raise InputError(f"a worker process failed ({reason}); run again with fewer workers, or 0")


def batched(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Split rows into parts of `size`; the last one may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class _Calls(Dataset, Generic[Argument, Result]):
    """The calls as a dataset. An error that is one line is a result: DataLoader would put its traceback into it."""

    def __init__(self, function: Callable[[Argument], Result]) -> None:
        self.function = function

    def __getitem__(self, argument: Argument) -> Result | Exception:
        try:
            return self.function(argument)
        except ONE_LINE as error:
            return error


def _unchanged(result: Any) -> Any:
    return result


def _context(modules: Sequence[str]) -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def _start(loader: DataLoader) -> Iterator[Any]:
    """Starts the workers with interrupts blocked, which they inherit: Ctrl-C is for this process to act upon."""
    resource_tracker.ensure_running()  # which would be started here, and unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _main_module_hidden():
            return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Hide where the main module comes from, so that processes started meanwhile do not import it.

    No function that they call is of that module.
    """
    main = vars(sys.modules["__main__"])
    origin = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.update(dict.fromkeys(origin))
    try:
        yield
    finally:
        main.update(origin)


def _end_with_parent(_worker: int) -> None:
    """Ends this worker when the process that uses it has gone, even killed.

    DataLoader's own watch looks at the fork server instead, which stays as long as any worker does.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
