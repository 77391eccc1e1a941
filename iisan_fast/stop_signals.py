"""Stop work when a signal asks for it: after the part under way, so that all that is done is kept."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = tuple(  # Windows lacks SIGHUP
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
SAME_REQUEST = 0.5  # seconds in which a repeated signal is no second request: terminals and `timeout` send it twice


class Interrupted(BaseException):
    """Raised by a signal in a block of `StopRequest.raised_at_once`."""


class StopRequest:
    """The first signal that asked the work to stop, if there was one."""

    def __init__(self) -> None:
        """Begin without a signal."""
        self.signal_number: int | None = None
        self._asked_at = 0.0
        self._raises = False
        self._previous: dict[int, signal.Handlers | signal._HANDLER] = {}

    @contextmanager
    def raised_at_once(self) -> Iterator[None]:
        """Raise Interrupted inside the block as soon as a signal comes, or has come. Use it where nothing is written.

        Code in the block may swallow the exception, so look at `signal_number` after the block as well.
        """
        self._raises = True
        try:
            if self.signal_number is not None:
                raise Interrupted
            yield
        finally:
            self._raises = False

    def take_over(self) -> None:
        """Handle the signals from now on. A signal that is ignored, as SIGHUP is under nohup, stays ignored."""
        for number in STOP_SIGNALS:
            previous = signal.getsignal(number)
            if previous not in (None, signal.SIG_IGN):  # None: a handler that Python cannot put back
                self._previous[number] = previous
                signal.signal(number, self._handle)

    def give_back(self) -> None:
        """Put the earlier handlers back."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        """Note the first signal. A second one acts at once, as it would have without this object.

        Raises Interrupted at the first signal inside a block of `raised_at_once`.
        """
        if self.signal_number is None:
            self.signal_number = number
            self._asked_at = time.monotonic()
            if self._raises:
                raise Interrupted
        elif time.monotonic() - self._asked_at > SAME_REQUEST:
            self.give_back()
            signal.raise_signal(number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT, SIGTERM and SIGHUP into a request to stop during the block, and yield the request.

    The block looks at the request when a part of its work is done, saves what is done, and raises errors.Stopped. A
    request that it does not answer, because the work was complete, is sent again after the block. A second signal acts
    at once. Only the main thread can handle signals; in another one the request never comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    request.take_over()
    try:
        yield request
    finally:
        request.give_back()
    if request.signal_number is not None:
        signal.raise_signal(request.signal_number)
