"""Meet the other ranks of a job at a store, a small server of the launcher's or of rank 0's: who has come, who has not.

All ranks have to come within a minute. A launcher such as torchrun starts them at once, so one that takes longer is
missing.
"""

from __future__ import annotations

import functools
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
RETRY_SECONDS = 0.2
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
    store = PrefixStore(f"iisan-fast/{place.attempt}", server)
    _meet(store, place, deadline)
    return store


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
            first_of_machine = place.local_rank == 0 or place.rank == 1
            raise MeetingError(
                f"{ADDRESS}, {PORT}: nothing answers at {place.address}:{place.port} within {SECONDS:.0f} seconds; "
                "start rank 0 there, and open the port in its firewall",
                place.rank if first_of_machine else 0,
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


def _meet(store: Store, place: JobPlace, deadline: float) -> None:
    """Wait until all ranks have come. Raises MeetingError if one has not, or has come twice."""
    keys = [f"rank {rank}" for rank in range(place.count)]
    where = f"{place.address}:{place.port}"
    if store.add(f"{keys[place.rank]} starts", 1) > 1:
        message = f"rank {place.rank} came twice to {where}; another job uses the port: choose another"
        raise MeetingError(message, place.rank)
    store.set(keys[place.rank], socket.gethostname())
    missing = _missing(store, keys)
    while missing and time.monotonic() < deadline:
        time.sleep(RETRY_SECONDS)
        missing = _missing(store, keys)
    if missing:
        came = sorted(set(range(place.count)) - set(missing))
        names = ", ".join(map(str, missing))
        raise MeetingError(
            f"rank {names} of {place.count} did not come to {where} within {SECONDS:.0f} seconds; "
            "start all ranks at once",
            came[0],
        )


def _missing(store: Store, keys: list[str]) -> list[int]:
    """Return the ranks that have not come. Raises MeetingError if the store has gone."""
    try:
        return [] if store.check(keys) else [rank for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError as error:
        raise MeetingError(f"rank 0 has gone before all ranks have come ({_first_line(error)})", 0) from None


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return next(iter(str(error).splitlines()), type(error).__name__)
