"""Channels between ranks: strangers stay out, and messages come whole."""

from __future__ import annotations

import json
import socket

import pytest
from torch.distributed import HashStore

from helpers.rank_programs import free_port
from iisan_fast.errors import InputError
from iisan_fast.launcher import JobPlace
from iisan_fast.ranks.job_channel import KEY, Channel, connect_to_first
from iisan_fast.ranks.job_watch import FirstRankWatch, OtherRankWatch, RankEnding


def place(rank: int, is_one_machine: bool = True) -> JobPlace:
    """Return a rank's place in a job of two."""
    return JobPlace(rank, 2, rank, "127.0.0.1", 1, is_one_machine, False, False)


@pytest.mark.parametrize("is_one_machine", [True, False])
def test_a_stranger_is_shut_out_and_the_rank_is_let_in(is_one_machine):
    store = HashStore()
    printed: list[str] = []
    first = FirstRankWatch(place(0, is_one_machine), store, printed.append)
    port = json.loads(store.get(KEY))["port"]
    for content in (b"GET / HTTP/1.0\n\n", b'{"token": "guess", "rank": 1, "machine": "x"}\n', b"[1]\n", b"\xff\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
            stranger.sendall(content)
            assert stranger.recv(100) == b""
    other = OtherRankWatch(place(1, is_one_machine), store, printed.append)
    assert other.leave(RankEnding()) == 0
    assert first.leave(RankEnding()) == 0
    assert printed == []


def test_a_first_rank_that_cannot_be_reached_is_one_line():
    store = HashStore()
    store.set(KEY, json.dumps({"addresses": ["127.0.0.1"], "port": free_port(), "token": "x"}))
    with pytest.raises(InputError, match=r"^rank 1 on .* cannot reach rank 0 at 127\.0\.0\.1 \(port \d+\); open"):
        connect_to_first(place(1), store)


def test_messages_come_whole_and_a_broken_one_ends_the_channel():
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    channel = Channel(ours)
    theirs.sendall(b'{"a": 1}\n{"b"')
    assert channel.read() == [{"a": 1}]
    theirs.sendall(b": 2}\n")
    assert channel.read() == [{"b": 2}]
    theirs.sendall(b"no JSON\n")
    assert channel.read() is None
    ours.close()
    theirs.close()
