"""Remember texts for a job in the store of its launcher, which holds them when it starts all ranks again.

torchrun's agent has such a store. It goes with the machine of rank 0; a job without one remembers nothing.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from ..errors import InputError
from ..launcher import ADDRESS, PORT, launcher_store
from .ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import TCPStore

SECONDS = 10.0  # in which the store answers
PREFIX = "iisan-fast remembers "


class JobMemory:
    """The texts that a job remembers, by name. Rank 0 reads and writes them."""

    def __init__(self, ranks: Ranks) -> None:
        """Take the ranks of the job; one rank that a launcher has started is a job too."""
        self._ranks = ranks
        self._store: TCPStore | None = None

    def recall(self, name: str) -> str | None:
        """Return a text on all ranks, which all call it; None if there is none.

        Raises InputError if the launcher's store does not answer.
        """
        return self._ranks.first_does(lambda: self._read(PREFIX + name))

    def note(self, name: str, text: str) -> None:
        """Remember a text. Rank 0 alone calls it. Raises InputError if the launcher's store does not answer."""
        if (store := self._connected()) is not None:
            store.set(PREFIX + name, text)

    def _read(self, key: str) -> str | None:
        """Return a text of the store; None if there is none."""
        store = self._connected()
        if store is None or not store.check([key]):
            return None
        return store.get(key).decode()

    def _connected(self) -> TCPStore | None:
        """Return the launcher's store; None if it has none. Raises InputError if it does not answer."""
        address = launcher_store()
        if self._store is not None or address is None:
            return self._store
        from torch.distributed import TCPStore

        try:
            self._store = TCPStore(
                *address, None, False, timedelta(seconds=SECONDS), wait_for_workers=False, multi_tenant=True
            )
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), "no reason is known")
            raise InputError(
                f"{ADDRESS}, {PORT}: the launcher's store does not answer at {address[0]}:{address[1]} ({reason}); "
                "start the job again"
            ) from None
        return self._store
