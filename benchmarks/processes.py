"""Measure in new processes, which hold nothing of the one that begins them."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from .. import runtime
from ..errors import InputError
from ..ranks import leave_job, threads_of_rank

LOGGER = logging.getLogger("iisan_fast")


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return a function's result, computed in a new process, which ends with this one.

    Raises what the function raises, and InputError if the process dies.
    """
    others = {*multiprocessing.active_children()}
    spawn = multiprocessing.get_context("spawn")
    level = LOGGER.level
    threads = threads_of_rank()
    with ProcessPoolExecutor(1, spawn, initializer=_prepare_process, initargs=(level, threads)) as pool:
        future = pool.submit(function, *arguments)
        try:
            return future.result()
        except BrokenProcessPool:
            raise InputError(
                f"the process that measures {function.__name__} ended early; it may have lacked memory"
            ) from None
        except (KeyboardInterrupt, SystemExit):  # leaving the pool would wait for the function, for hours perhaps
            for child in {*multiprocessing.active_children()} - others:
                child.terminate()
            raise


def _prepare_process(level: int, threads: int | None) -> None:
    """Set a new process up as the program, with the level of log messages that --quiet or --verbose chose.

    It is no rank of a job. threads: of the rank that starts it, if one does.
    """
    leave_job(threads)
    runtime.prepare_program()
    LOGGER.setLevel(level)
