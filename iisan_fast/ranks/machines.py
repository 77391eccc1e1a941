"""Share a machine's cores out among its ranks."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from ..launcher import JobPlace

THREADS_VARIABLE = "OMP_NUM_THREADS"
OF_TORCHRUN = "1"  # what torchrun sets if the user has set nothing


@dataclass(frozen=True)
class Machine:
    """The machine that a rank runs on, and the cores that it may use there."""

    name: str
    cores: frozenset[int]

    @staticmethod
    def here() -> Machine:
        """Return the machine of this process."""
        is_limited = hasattr(os, "sched_getaffinity")
        cores = os.sched_getaffinity(0) if is_limited else range(os.cpu_count() or 1)
        return Machine(socket.gethostname(), frozenset(cores))


def share_of_cores(machines: Sequence[Machine], rank: int) -> int:
    """Return the number of cores for a rank: its part of those that it shares with ranks of its machine, at least 1.

    machines: of all ranks. Ranks that a launcher has bound to cores of their own keep all of them.
    """
    neighbours = [machine for machine in machines if machine.name == machines[rank].name]
    users = Counter(chain.from_iterable(machine.cores for machine in neighbours))
    share = sum(1 / users[core] for core in machines[rank].cores)
    return max(1, int(share + 1e-6))


def take_share_of_cores(place: JobPlace, machines: Sequence[Machine]) -> None:
    """Let torch compute with this rank's share of the machine's cores, unless the user has set OMP_NUM_THREADS.

    torchrun sets it to 1 if the user has not, so 1 counts as unset there.
    """
    import torch

    chosen = os.environ.get(THREADS_VARIABLE)
    if chosen is None or (place.by_torchrun and chosen == OF_TORCHRUN):
        torch.set_num_threads(share_of_cores(machines, place.rank))
