"""Meet the other ranks of a job at a store, a small server of the launcher's or of rank 0's: who has come, who has not.

All ranks have to come within a minute. A launcher such as torchrun starts them at once, so one that takes longer is
missing.
"""

from __future__ import annotations

import functools
import json
import secrets
import socket
import time
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING

from ..errors import InputError
from ..launcher import ADDRESS, PORT, JobPlace

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

SECONDS = 60.0  # in which all ranks have to come
ANSWER_SECONDS = 10.0  # in which a store answers
RETRY_SECONDS = 0.1
SECONDS_FOR_FIRST = 5.0  # in which rank 0 closes a meeting whose time is over
PREFIX, COUNTER, CLOSED = "iisan-fast meeting ", "iisan-fast meetings", "is closed"  # of keys in the store
IN_USE = "EADDRINUSE"  # in the text of torch's error


class MeetingError(InputError):
    """Ranks that did not come together. Some or all of those that came raise it."""

    def __init__(self, message: str, speaker: int) -> None:
        """Take the message, and the rank that prints it."""
        super().__init__(message)
        self.speaker = speaker


@functools.cache
def job_store(place: JobPlace) -> Store:
    """Return the store of a job, in which all ranks have met. The first call waits for them.

    Raises InputError if torch lacks torch.distributed or Gloo, if the address is unknown or the port in use, and
    MeetingError if a rank has not come, or has come twice.
    """
    _refuse_missing_parts()
    _refuse_unknown(place.address)
    from torch.distributed import PrefixStore

    deadline = time.monotonic() + SECONDS
    server = _opened(place) if place.rank == 0 and not place.launcher_has_store else _found(place, deadline)
    return PrefixStore(_meet(server, place, deadline), server)


def _refuse_missing_parts() -> None:
    """Raise InputError if this torch cannot join processes."""
    from torch import distributed

    if not distributed.is_available():
        raise InputError("torch: was built without torch.distributed, which several ranks need; install another build")
    if not distributed.is_gloo_available():
        raise InputError("torch: was built without Gloo, which several ranks need; install another build")


def _refuse_unknown(address: str) -> None:
    """Raise InputError if no machine of this name is known."""
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        message = (
            f"{ADDRESS}: {address!r} cannot be resolved ({reason}); give the name or IP address of rank 0's machine"
        )
        raise InputError(message) from None


def _opened(place: JobPlace) -> TCPStore:
    """Open the store, on rank 0. Raises InputError if its port is in use, or cannot be opened."""
    try:
        return _store(place, is_master=True)
    except RuntimeError as error:
        if IN_USE in str(error):
            raise InputError(f"{PORT}: port {place.port} is in use on this machine; choose another") from None
        raise InputError(f"{PORT}: port {place.port} cannot be opened ({_first_line(error)}); choose another") from None


def _found(place: JobPlace, deadline: float) -> TCPStore:
    """Connect to the store. Raises MeetingError if nothing answers in time, InputError if something else answers."""
    while not _accepts(place):
        if time.monotonic() > deadline:
            raise MeetingError(
                f"{ADDRESS}, {PORT}: nothing answers at {place.address}:{place.port} within {SECONDS:.0f} seconds; "
                "start rank 0 there, and open the port in its firewall",
                _speaker(place),
            )
        time.sleep(RETRY_SECONDS)
    try:
        return _store(place, is_master=False)
    except RuntimeError as error:
        raise InputError(
            f"{ADDRESS}, {PORT}: no rank 0 answers at {place.address}:{place.port} ({_first_line(error)}); another "
            "program may use the port: choose another"
        ) from None


def _accepts(place: JobPlace) -> bool:
    """Return True if something listens at the meeting's address."""
    try:
        socket.create_connection((place.address, place.port), timeout=ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _store(place: JobPlace, is_master: bool) -> TCPStore:
    """Connect to the store, or open it. Raises RuntimeError, also if the port answers as no store does.

    A thread connects, because torch waits without end for some answers. Nothing waits for that thread.
    """
    from torch.distributed import TCPStore

    outcome: list[TCPStore | RuntimeError] = []
    timeout = timedelta(seconds=ANSWER_SECONDS)

    def connect() -> None:
        try:
            store = TCPStore(
                place.address, place.port, None, is_master, timeout, wait_for_workers=False, multi_tenant=True
            )
            outcome.append(store)
        except RuntimeError as error:
            outcome.append(error)

    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS + 2)
    result = outcome[0] if outcome else RuntimeError("no answer that can be understood")
    if isinstance(result, RuntimeError):
        raise result
    return result


def _meet(store: Store, place: JobPlace, deadline: float) -> str:
    """Wait until all ranks have come, and return the name of this meeting, which no other has in the store.

    A launcher that starts ranks again may keep its store. So rank 0 opens a meeting under a new number, each rank comes
    with a token, and rank 0 closes the meeting with the tokens of all. A rank that finds an older meeting waits on.

    Raises MeetingError if a rank has not come, or has come twice.
    """
    try:
        return _open_meeting(store, place, deadline) if place.rank == 0 else _come(store, place, deadline)
    except RuntimeError as error:
        raise MeetingError(f"rank 0 has gone before all ranks have come ({_first_line(error)})", 0) from None


def _open_meeting(store: Store, place: JobPlace, deadline: float) -> str:
    """Wait for all ranks, on rank 0. Raises MeetingError, as the other ranks do, if one does not come."""
    meeting = f"{PREFIX}{store.add(COUNTER, 1)}"
    keys = [f"{meeting} rank {rank}" for rank in range(1, place.count)]
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(RETRY_SECONDS)
    tokens = [store.get(key).decode() if store.check([key]) else "" for key in keys]
    store.set(f"{meeting} {CLOSED}", json.dumps(tokens))
    _refuse_missing(tokens, place)
    return meeting


def _come(store: Store, place: JobPlace, deadline: float) -> str:
    """Come to the meeting that rank 0 opens. Raises MeetingError as `_meet` does."""
    token = secrets.token_hex(8)
    where = f"{place.address}:{place.port}"
    came_to = 0
    while time.monotonic() < deadline + SECONDS_FOR_FIRST:
        number = store.add(COUNTER, 0)
        meeting = f"{PREFIX}{number}"
        if number and not store.check([f"{meeting} {CLOSED}"]):
            store.set(f"{meeting} rank {place.rank}", token)
            came_to = number
        elif number and number == came_to:  # a meeting that was closed from the beginning is an older one
            tokens = json.loads(store.get(f"{meeting} {CLOSED}"))
            _refuse_missing(tokens, place)
            if tokens[place.rank - 1] != token:
                message = f"rank {place.rank} came twice to {where}; another job uses the port: choose another"
                raise MeetingError(message, place.rank)
            return meeting
        time.sleep(RETRY_SECONDS)
    raise MeetingError(f"rank 0 of {place.count} did not come to {where} within {SECONDS:.0f} seconds", _speaker(place))


def _refuse_missing(tokens: list[str], place: JobPlace) -> None:
    """Raise MeetingError, which rank 0 prints, if a rank has no token. tokens: of the ranks after 0."""
    missing = ", ".join(str(rank) for rank, token in enumerate(tokens, start=1) if not token)
    if missing:
        where = f"{place.address}:{place.port}"
        message = f"rank {missing} of {place.count} did not come to {where} within {SECONDS:.0f} seconds"
        raise MeetingError(f"{message}; start all ranks at once", 0)


def _speaker(place: JobPlace) -> int:
    """Return the rank that prints on this machine that rank 0 is missing."""
    return place.rank if place.local_rank == 0 or place.rank == 1 else 0


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return next(iter(str(error).splitlines()), type(error).__name__)
