"""Check that signals ask the work to stop, that handlers come back, and that a second signal acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from iisan_fast import stop_signals
from iisan_fast.errors import Stopped
from iisan_fast.stop_signals import STOP_SIGNALS, Interrupted, stop_requests

SIGNALS = pytest.mark.parametrize("number", STOP_SIGNALS)


class Handled(BaseException):
    """Raised by the handlers that stood before."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, object]]:
    """Give each signal a handler that raises, and check that it stands again afterwards."""

    def handle(number: int, _frame: object) -> None:
        raise Handled(number)

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    yield {number: handle for number in STOP_SIGNALS}
    after = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == dict.fromkeys(STOP_SIGNALS, handle)


@SIGNALS
def test_a_signal_is_a_request_that_the_work_answers(number):
    done = []
    with pytest.raises(Stopped), stop_requests() as request:
        for part in range(5):
            if part == 2:
                signal.raise_signal(number)
            done.append(part)
            if request.signal_number is not None:
                raise Stopped("saved", request.signal_number)
    assert done == [0, 1, 2] and request.signal_number == number


@SIGNALS
def test_a_request_without_an_answer_is_sent_again_after_the_work(number):
    done = []
    with pytest.raises(Handled), stop_requests():
        signal.raise_signal(number)
        done.append("all")
    assert done == ["all"]


@SIGNALS
def test_a_second_signal_acts_at_once_but_not_one_that_comes_with_the_first(number, monkeypatch):
    now = 100.0
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: now)
    with pytest.raises(Handled), stop_requests() as request:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert request.signal_number == number
        now = 101.0
        signal.raise_signal(number)
        pytest.fail("the second signal did not act")


@SIGNALS
def test_a_block_without_writing_is_left_at_once(number):
    with pytest.raises(Stopped), stop_requests() as request:
        with pytest.raises(Interrupted), request.raised_at_once():
            signal.raise_signal(number)
            pytest.fail("the block went on")
        with pytest.raises(Interrupted), request.raised_at_once():
            pytest.fail("the block began after the signal")
        raise Stopped("saved", request.signal_number)


def test_an_ignored_signal_stays_ignored(handlers):
    with stop_requests() as request:
        pass
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_requests() as request:
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert request.signal_number is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, handlers[signal.SIGHUP])


def test_another_thread_leaves_the_handlers_alone(handlers):
    seen = []

    def work() -> None:
        with stop_requests() as request:
            seen.extend((request.signal_number, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, handlers[signal.SIGINT]]
