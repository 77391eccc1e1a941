"""Calls in worker processes, ahead of their use: files are read and decoded while an encoder computes.

Workers are forked from a fork server, never from this process, since threads (of torch or a tokenizer) and open
databases do not survive a fork. A worker computes with one thread. It does not import the main module, since a script
would then run again in every worker.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.reduction import DupFd, ForkingPickler
from threading import Thread
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from .errors import InputError, is_out_of_memory
from .stop_signals import STOP_SIGNALS

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext  # which Windows lacks

LOGGER = logging.getLogger(__name__)
MAX_WORKERS = 16  # limit of the default
ITEMS_A_WORKER = 2000  # for fewer items, a worker takes longer to start than it saves
CHECKED_AT_ONCE = 64  # items a call, when a catalogue is checked
DEAD_WORKER = re.compile(r"exited unexpectedly|is killed by signal|Too many open files")  # errors of DataLoader
ONE_LINE = (InputError, OSError, MemoryError)  # errors that the program shows as one line, without a traceback

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def worker_count(asked: int | None, items: int, device: torch.device, sharing: int = 1) -> int:
    """Return the number of worker processes: `asked`, or a default if that is None.

    The default is one worker for every CPU that an encoder on `device` leaves idle, at most MAX_WORKERS, and at most
    one for ITEMS_A_WORKER items. sharing: the number of processes that share the CPUs and have workers.
    """
    if asked is not None:
        return asked
    idle = usable_cpus() // sharing - (torch.get_num_threads() if device.type == "cpu" else 1)
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

    Where shared memory is too small, results take unnamed files; where no process can be started, this one does the
    work. Both are logged.

    Raises the function's InputError, OSError or MemoryError unchanged, and InputError, within seconds, if a worker
    process dies.
    """
    if not arguments:
        return
    loader = DataLoader(
        _Calls(function, packs=workers > 0),
        batch_size=None,
        sampler=arguments,
        collate_fn=_unchanged,
        num_workers=workers,
        multiprocessing_context=_context(modules) if workers else None,
        worker_init_fn=_end_with_parent,
        pin_memory=pin,
        generator=torch.Generator(),  # DataLoader draws seeds from it, not from the global generator
    )
    try:
        results = _start(loader)
    except (OSError, EOFError) as error:  # no room for semaphores in /dev/shm, or no process can be forked
        _say_once(f"no worker process can be started ({error}; /dev/shm may be full): this process does their work")
        results = map(function, arguments)
    try:
        for _ in arguments:
            yield _unpacked(next(results))
    except (ConnectionError, EOFError) as error:  # a worker died before its result was fetched
        reason = f"its connection broke: {error}"
    except RuntimeError as error:  # of DataLoader: a worker was killed
        if not DEAD_WORKER.search(str(error)):
            raise
        reason = _cause_of_death(results) or str(error).splitlines()[0]
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

    def __init__(self, function: Callable[[Argument], Result], packs: bool) -> None:
        """Take the function that `calls_ahead` calls. packs: whether results leave a worker process."""
        self.function = function
        self.packs = packs
        self.takes_files = False  # becomes True in a worker that finds no room in shared memory

    def __getitem__(self, argument: Argument) -> Result | _Packed | Exception:
        """Return function(argument), or its error if that is one of ONE_LINE or says that memory was refused."""
        try:
            result = self.function(argument)
            return self._pack(result) if self.packs else result
        except ONE_LINE as error:
            return error
        except RuntimeError as error:
            if not self.packs or not is_out_of_memory(error):
                raise
            return MemoryError(str(error).splitlines()[0])

    def _pack(self, result: Result) -> _Packed:
        """Put a result's tensors into shared memory, or the result into a file if there is no room for them.

        DataLoader would do this in a thread, whose error would leave the other side waiting for ever.
        Raises OSError if there is no room for the file either.
        """
        if not self.takes_files:
            try:
                return _Packed(bytes(ForkingPickler.dumps(result)), None)
            except (OSError, RuntimeError):  # torch finds /dev/shm full, or too many files open
                self.takes_files = True
        with tempfile.TemporaryFile() as file:
            pickle.dump(result, file, pickle.HIGHEST_PROTOCOL)
            file.flush()
            return _Packed(b"", DupFd(file.fileno()))


class _Packed:
    """A result on its way from a worker process: pickled, its tensors in shared memory, or all in an unnamed file."""

    def __init__(self, content: bytes, file: DupFd | None) -> None:
        """Take the pickled result, or the file that holds it."""
        self.content = content
        self.file = file

    def unpack(self) -> Any:
        """Return the result. Raises ConnectionError if the worker has died.

        The pickle is of a process that this one has started, and reaches it through a pipe or file of theirs alone.
        """
        if self.file is None:
            return pickle.loads(self.content)
        folder = tempfile.gettempdir()
        _say_once(f"/dev/shm has no room for the results of worker processes: they take files in {folder}")
        try:
            descriptor = self.file.detach()
        except FileNotFoundError as error:  # the worker's socket is gone
            raise ConnectionError(str(error)) from None
        with open(descriptor, "rb") as file:
            file.seek(0)
            return pickle.load(file)

    def pin_memory(self) -> Any:
        """Return the result, in pinned memory if it can be pinned."""
        result = self.unpack()
        return result.pin_memory() if hasattr(result, "pin_memory") else result


def _unpacked(result: Any) -> Any:
    """Return what a call returned. Raises its error if it raised one of ONE_LINE."""
    if isinstance(result, _Packed):
        result = result.unpack()
    if isinstance(result, ONE_LINE):
        raise result
    return result


@functools.cache
def _say_once(message: str) -> None:
    """Log a warning, once a process."""
    LOGGER.warning(message)


def _cause_of_death(results: Any) -> str:
    """Return how the worker processes of a DataLoader's iterator have ended; empty if none has."""
    codes = {process.exitcode for process in getattr(results, "_workers", ())} - {None, 0}
    causes = []
    for code in sorted(codes):
        if code == -signal.SIGKILL:
            causes.append("killed by SIGKILL, as the system does when memory runs out")
        elif code < 0:
            causes.append(f"killed by {signal.Signals(-code).name}")
        else:
            causes.append(f"exited unexpectedly with code {code}")
    return ", ".join(causes)


def _unchanged(result: Any) -> Any:
    """Return the result itself: nothing is collated."""
    return result


def _context(modules: Sequence[str]) -> ForkServerContext:
    """Return a multiprocessing context whose fork server imports `modules` before it forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def _try_semaphores(context: ForkServerContext, workers: int) -> None:
    """Make about as many semaphores and pipes as the workers need, and give them back.

    Raises OSError if that fails. DataLoader would print a traceback besides.
    """
    for queue in [context.Queue() for _ in range(workers + 2)]:
        queue.close()


def _start(loader: DataLoader) -> Iterator[Any]:
    """Start the workers with the stop signals blocked, which they inherit: only this process acts upon Ctrl-C.

    A terminal and `timeout` signal the whole group of processes. Workers end when this process closes them or ends.
    """
    if loader.num_workers:
        _try_semaphores(loader.multiprocessing_context, loader.num_workers)
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
