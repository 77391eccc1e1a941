"""Run work in forked processes that may be killed, crash, hang, or take too much memory, and say how it ended.

Forking costs milliseconds, where a new interpreter would import torch first. It is safe as long as this process itself
starts no threads: all work that does runs in a child.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import InputError, Stopped

LONGEST_SECONDS = 60.0
NO_FAULT = ("done", "refused", "stopped", "killed")
FAULTS = ("traceback", "crash", "hang", "memory", "silent")


@dataclass(frozen=True)
class Ending:
    """Record the end of a call in a child: its kind, its result and what it cost."""

    # "done", "refused" (one line about the input), "stopped" (saved on a signal), "killed" (as asked for), or a fault:
    # "traceback", "crash", "hang", "memory"
    kind: str
    value: Any = None  # what the call returned, as JSON
    message: str = ""  # of the exception, or the traceback
    warnings: tuple[str, ...] = ()  # that the program logged
    seconds: float = 0.0
    grown_bytes: int = 0  # by which the resident memory grew at most


@dataclass(frozen=True)
class Kill:
    """A signal to send, so many seconds after the start of a child."""

    seconds: float
    signal_number: int = signal.SIGKILL


def run_child(work: Callable[[], Any], kill: Kill | None = None, limit: float = LONGEST_SECONDS) -> Ending:
    """Run `work` in a child and return how it ended.

    kill: a signal that it gets. limit: after so many seconds it hangs, and is killed.
    """
    return next(run_children([work], kill, limit))


def run_children(
    works: Sequence[Callable[[], Any]], kill: Kill | None = None, limit: float = LONGEST_SECONDS
) -> Iterator[Ending]:
    """Yield how each of the calls ended. They share children, one after the other, until one crashes or hangs."""
    next_work = 0
    while next_work < len(works):
        child = _Child(works[next_work:])
        started = time.monotonic()
        try:
            while next_work < len(works):
                ending = child.next_ending(kill, started, limit)
                yield ending
                next_work += 1
                if ending.kind in ("crash", "hang", "killed"):
                    break
        finally:
            child.end()


@dataclass
class _Child:
    """A forked process that makes calls and writes one line of JSON for each."""

    works: Sequence[Callable[[], Any]]
    process: int = field(init=False)
    lines: BinaryIO = field(init=False)
    status: int | None = field(init=False, default=None)  # of the process, once it has been waited for
    unread: bytes = b""  # what was read beyond the last line

    def __post_init__(self) -> None:
        """Fork."""
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            os.close(reading)
            _serve(self.works, writing)
        os.close(writing)
        self.lines = os.fdopen(reading, "rb", buffering=0)

    def next_ending(self, kill: Kill | None, started: float, limit: float) -> Ending:
        """Return how the next call ends. The signal of `kill` is sent so long after `started`."""
        began = time.monotonic()
        sent = kill is None
        while b"\n" not in self.unread:
            now = time.monotonic()
            if kill is not None and not sent and now >= started + kill.seconds:
                os.kill(self.process, kill.signal_number)
                sent = True
            if now > began + limit:
                self.end()
                return Ending("hang", message=f"after {limit:.0f} s", seconds=limit)
            wait = began + limit - now if sent or kill is None else started + kill.seconds - now
            if select.select([self.lines], [], [], max(0.0, min(wait, 1.0)))[0]:
                part = self.lines.read(1 << 20)
                if not part:
                    return self._without_answer(kill)
                self.unread += part
        line, _, self.unread = self.unread.partition(b"\n")
        return Ending(**{**json.loads(line), "seconds": time.monotonic() - began})

    def end(self) -> None:
        """Kill the process if it lives, and wait for it."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process, signal.SIGKILL)
            _, self.status = os.waitpid(self.process, 0)
            self.lines.close()

    def _without_answer(self, kill: Kill | None) -> Ending:
        """Return the ending of a call whose process has gone: it was killed as asked for, or it crashed."""
        _, self.status = os.waitpid(self.process, 0)
        self.lines.close()
        code = os.waitstatus_to_exitcode(self.status)
        if kill is not None and code == -kill.signal_number:
            return Ending("killed")
        return Ending("crash", message=f"the process ended with {code}")


def _serve(works: Sequence[Callable[[], Any]], writing: int) -> None:
    """Make the calls in the child, write their endings, and leave without running what the parent has registered.

    SIGINT is for the calls alone: between them it would end the child without an answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    try:
        with os.fdopen(writing, "wb", buffering=0) as file:
            for work in works:
                file.write(json.dumps(_ending(work)).encode() + b"\n")
    finally:
        os._exit(0)


def _ending(work: Callable[[], Any]) -> dict[str, Any]:
    """Make a call and return how it ended, as the fields of an Ending."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("iisan_fast").addHandler(handler)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts again from now
    ending: dict[str, Any]
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ending = {"kind": "done", "value": work()}
    except (InputError, OSError, MemoryError) as error:  # the command line prints these as one line
        ending = {"kind": "refused", "message": str(error)}
    except Stopped as stopped:
        ending = {"kind": "stopped", "message": str(stopped)}
    except KeyboardInterrupt:
        ending = {"kind": "stopped", "message": "interrupted"}
    except SystemExit as leaving:
        ending = {"kind": "stopped", "message": f"exit code {leaving.code}"}
    except BaseException:
        ending = {"kind": "traceback", "message": traceback.format_exc()}
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        logging.getLogger("iisan_fast").removeHandler(handler)
    return {**ending, "warnings": warnings, "grown_bytes": _resident("VmHWM") - before}


def _resident(name: str) -> int:
    """Return a resident size of this process in bytes: VmRSS, that of now, or VmHWM, the highest."""
    size = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(size[1]) << 10 if size else 0
