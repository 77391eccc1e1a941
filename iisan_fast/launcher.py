"""Read what a launcher of several processes, such as torchrun or srun, says about this one: its rank in the job."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import InputError

RANK, COUNT, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # "True" if torchrun's agent has the store
OF_SLURM = {RANK: "SLURM_PROCID", COUNT: "SLURM_STEP_NUM_TASKS", LOCAL_RANK: "SLURM_LOCALID"}
REMEDY = f"start it by torchrun, or set {RANK}, {COUNT}, {LOCAL_RANK}, {ADDRESS} and {PORT} for each rank"
LAST_PORT = (1 << 16) - 1


@dataclass(frozen=True)
class JobPlace:
    """The place of this process in a job of several, and the address where they meet."""

    rank: int  # of this process, from 0
    count: int  # of ranks, 2 or more
    local_rank: int  # of this process among those of its machine, from 0
    address: str  # of the store where the ranks meet
    port: int
    is_one_machine: bool  # True if all ranks are known to share this machine
    by_torchrun: bool
    launcher_has_store: bool  # otherwise rank 0 opens it

    @property
    def speaks_for_machine(self) -> bool:
        """Return True if this rank prints what all ranks of its machine see, such as a name that is unknown there."""
        return self.rank == 0 or self.local_rank == 0


def job_place() -> JobPlace | None:
    """Return this process's place in a job of several processes; None if it runs alone.

    The variables are those of torchrun. Without them, those of srun count if MASTER_ADDR and MASTER_PORT are set: they
    say that the tasks are one job. Raises InputError, which names the variable, if they do not describe a job.
    """
    names = {RANK: RANK, COUNT: COUNT, LOCAL_RANK: LOCAL_RANK}
    if COUNT not in os.environ and {ADDRESS, PORT} <= os.environ.keys():
        names = OF_SLURM
    count = _number(names[COUNT], 1 << 20, default=1)
    if count <= 1:
        return None
    address = os.environ.get(ADDRESS, "")
    if not address:
        raise InputError(f"{ADDRESS}: expected the name of the machine of rank 0, found none; {REMEDY}")
    return JobPlace(
        rank=_number(names[RANK], count - 1),
        count=count,
        local_rank=_number(names[LOCAL_RANK], count - 1),
        address=address,
        port=_number(PORT, LAST_PORT),
        is_one_machine=_number("LOCAL_WORLD_SIZE", count, default=0) == count,
        by_torchrun="TORCHELASTIC_RUN_ID" in os.environ,
        launcher_has_store=launcher_store() is not None,
    )


def is_one_of_several() -> bool:
    """Return True if a launcher has started several processes, also if its variables are wrong otherwise."""
    try:
        return job_place() is not None
    except InputError:  # whoever joins the job reports it
        return True


def launcher_store() -> tuple[str, int] | None:
    """Return the address and the port of a store that outlives the ranks; None if the launcher has none.

    Also one process may have such a launcher. Raises InputError if the port is no number.
    """
    if os.environ.get(AGENT_STORE) != "True":
        return None
    return os.environ.get(ADDRESS, ""), _number(PORT, LAST_PORT)


def is_silent_rank() -> bool:
    """Return True in a process of a job that is not rank 0, which alone prints."""
    try:
        place = job_place()
    except InputError:
        return all(os.environ.get(name, "0").lstrip("0").isdecimal() for name in (RANK, LOCAL_RANK))
    return place is not None and place.rank > 0


def _number(name: str, largest: int, default: int | None = None) -> int:
    """Return a whole number from the environment, of 0 to `largest`. Raises InputError for anything else."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or int(text) > largest:
        value = "none" if text is None else repr(text)
        raise InputError(f"{name}: expected a whole number from 0 to {largest}, found {value}; {REMEDY}")
    return int(text)
