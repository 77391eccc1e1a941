"""Run a function in several processes that are the ranks of a job on this machine, as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import TCPStore

from iisan_fast.ranks import Ranks, joined_ranks

PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "iisan_fast.training.trainer", "helpers.rank_processes"]


def run_on_ranks(count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60) -> list[Any]:
    """Return the results of `function(ranks, *arguments)` of each rank, in the order of the ranks.

    function: defined in a module that the tests can import, not in a test. Raises AssertionError, with the tracebacks,
    if a rank raises; TimeoutError if a rank has not ended in time. No process is left.
    """
    context = multiprocessing.get_context("forkserver")  # it imports torch once, and starts a rank in milliseconds
    context.set_forkserver_preload(PRELOADED)
    store = TCPStore("127.0.0.1", 0, None, is_master=True)
    copied = pickle.dumps(arguments)  # by value: multiprocessing would share the memory of tensors
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_run, args=(rank, count, store.port, ours, function, copied), daemon=True)
        for rank, (_, ours) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, ours in pipes:
        ours.close()
    try:
        outcomes = [_received(theirs, timeout) for theirs, _ in pipes]
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    failures = [f"rank {rank}: {outcome[1]}" for rank, outcome in enumerate(outcomes) if not outcome[0]]
    assert not failures, "\n".join(failures)
    return [result for _, result in outcomes]


def _received(pipe: Connection, timeout: float) -> tuple[bool, Any]:
    """Return whether a rank returned, and its result or traceback."""
    if not wait([pipe], timeout):
        raise TimeoutError(f"a rank has not ended in {timeout} seconds")
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "ended without a result"


def _run(rank: int, count: int, port: int, pipe: Connection, function: Callable[..., Any], arguments: bytes) -> None:
    """Join the job as torchrun's environment says, call the function, and send its result."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the test holds the store, as torchrun's agent does
    }
    torch.set_num_threads(1)
    try:
        ranks: Ranks = joined_ranks()
        outcome = (True, function(ranks, *pickle.loads(arguments)))
    except BaseException:
        outcome = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
