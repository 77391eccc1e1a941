"""Leave a command on the signals that stop it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..stop_signals import STOP_SIGNALS

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Leave the block by SystemExit on SIGINT, SIGTERM and SIGHUP, so that half-written files are removed.

    A signal that is ignored stays so, as nohup asks.
    """
    with handled_signals(_leave):
        yield


@contextmanager
def handled_signals(handler: Handler) -> Iterator[None]:
    """Call a handler on the stop signals during the block, unless they are ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # other threads receive no signals
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        before = {number: other for number, other in before.items() if other not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, other in before.items():
            signal.signal(number, other)


def _leave(number: int, _frame: FrameType | None) -> None:
    """Raise SystemExit with the exit code of a signal."""
    sys.exit(128 + number)
