"""Connect rank 0 with the other ranks by sockets of their own, over which they say how their work has ended.

The system closes a process's sockets when it ends, whatever ends it. So a rank that is killed is noticed at once, also
while the others compute or wait for a GPU. Messages are JSON, one a line. A token, which the job's store holds, keeps
strangers out.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..launcher import JobPlace

if TYPE_CHECKING:
    from torch.distributed import Store

KEY = "channel"  # in the store
SECONDS = 10.0  # in which rank 0 answers a connection
LONGEST_MESSAGE = 1 << 16  # bytes
BYTES_AT_ONCE = 1 << 12
# A machine that is switched off closes no socket: it is asked after 10 seconds of silence, and lost 15 seconds later.
KEEP_ALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
LOOPBACK = "127.0.0.1"


class Channel:
    """A connection to another rank."""

    def __init__(self, connection: socket.socket) -> None:
        """Take the connection."""
        self.connection = connection
        self._unread = b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict[str, Any]) -> bool:
        """Send a message. Return False if the other rank has gone."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def read(self) -> list[dict[str, Any]] | None:
        """Wait for bytes, and return the messages that are whole by now; None if the other rank has gone.

        A connection that sends something else counts as gone.
        """
        try:
            content = self.connection.recv(BYTES_AT_ONCE)
            *lines, self._unread = (self._unread + content).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        is_broken = len(self._unread) > LONGEST_MESSAGE or not all(isinstance(message, dict) for message in messages)
        return None if is_broken or not content else messages

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield messages until the other rank has gone."""
        while (messages := self.read()) is not None:
            yield from messages


def open_channels(place: JobPlace, store: Store) -> tuple[socket.socket, str]:
    """Open the socket of rank 0, announce it in the store, and return it with the token. Other ranks connect to it."""
    if place.is_one_machine:
        server = socket.create_server((LOOPBACK, 0), backlog=place.count)
    elif socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, backlog=place.count, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0), backlog=place.count)
    names = (_address_towards(place), place.address, socket.gethostname())
    addresses = [LOOPBACK] if place.is_one_machine else list(dict.fromkeys(names))
    token = secrets.token_hex(16)
    store.set(KEY, json.dumps({"addresses": addresses, "port": server.getsockname()[1], "token": token}))
    return server, token


def connect_to_first(place: JobPlace, store: Store) -> tuple[Channel, str]:
    """Return the channel to rank 0, and the name of its machine. Raises InputError if it cannot be reached."""
    announced = json.loads(store.get(KEY))
    hello = {"token": announced["token"], "rank": place.rank, "machine": socket.gethostname()}
    port = announced["port"]
    for address in announced["addresses"]:
        try:
            connection = socket.create_connection((address, port), timeout=SECONDS)
        except OSError:
            continue
        channel = Channel(connection)
        answer = next(channel.messages(), {}) if channel.send(hello) else {}
        if "machine" in answer:
            connection.settimeout(None)
            return channel, answer["machine"]
        connection.close()
    raise InputError(
        f"rank {place.rank} on {socket.gethostname()} cannot reach rank 0 at {', '.join(announced['addresses'])} (port "
        f"{port}); open the ports between the machines, or set MASTER_ADDR to an address that all of them reach"
    )


def _address_towards(place: JobPlace) -> str:
    """Return the address of this machine in the network of the meeting's address."""
    family, kind, _, _, address = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_DGRAM)[0]
    try:
        with socket.socket(family, kind) as probe:  # nothing is sent
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return place.address
