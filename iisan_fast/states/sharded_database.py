"""Read the databases of a cache's shards as one."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import lmdb

from .database import Database
from .shards import shard_of


class ShardedDatabase:
    """The open databases of all shards, in their order. It has the methods of a Database that reads."""

    def __init__(self, databases: Sequence[Database]) -> None:
        """Take the databases of the shards, open for reading."""
        self.databases = databases

    def close(self) -> None:
        """Close all databases."""
        for database in self.databases:
            database.close()

    @property
    def is_in_place(self) -> bool:
        """Return False if the path of a database leads to another file than the one that is open, or to none."""
        return all(database.is_in_place for database in self.databases)

    @property
    def size(self) -> int:
        """Return the bytes of all databases."""
        return sum(database.size for database in self.databases)

    @property
    def entry_count(self) -> int:
        """Return the number of entries of all databases."""
        return sum(database.entry_count for database in self.databases)

    @contextmanager
    def reading(self) -> Iterator[ShardedTransaction]:
        """Yield a transaction for reading. Raises InputError as `Database.reading` does."""
        with ExitStack() as opened:
            transactions = [opened.enter_context(database.reading()) for database in self.databases]
            yield ShardedTransaction(self.databases, transactions)

    @contextmanager
    def read_ahead(self) -> Iterator[None]:
        """Let the system read the files of all databases ahead in this context, as `Database.read_ahead`."""
        with ExitStack() as opened:
            for database in self.databases:
                opened.enter_context(database.read_ahead())
            yield

    def entries(self) -> Iterator[tuple[bytes, memoryview]]:
        """Yield the key and the value of each entry of all shards, in the order of the keys, as `Database.entries`."""
        return heapq.merge(*(database.entries() for database in self.databases), key=lambda entry: entry[0])


class ShardedTransaction:
    """The transactions of all shards, from which an entry is read by its key."""

    def __init__(self, databases: Sequence[Database], transactions: Sequence[lmdb.Transaction]) -> None:
        """Take a transaction of each shard's database."""
        self.databases = databases
        self.transactions = transactions

    def get(self, key: bytes) -> memoryview | None:
        """Return the value under a key, or None. Raises InputError if LMDB cannot read.

        The key holds the item's id, which gives the shard. A hash in place of a long id does not: all are asked.
        """
        item_id = key.partition(b"\0")[2]
        if item_id.startswith(b"\0"):
            values = (self._value(position, key) for position in range(len(self.transactions)))
            return next((value for value in values if value is not None), None)
        return self._value(shard_of(item_id, len(self.transactions)), key)

    def _value(self, position: int, key: bytes) -> memoryview | None:
        """Return the value under a key in one shard, or None. Raises InputError if LMDB cannot read."""
        try:
            return self.transactions[position].get(key)
        except lmdb.Error as error:
            raise self.databases[position].unusable(error) from None
