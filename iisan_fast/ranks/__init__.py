"""The processes of a job over several devices: who they are, and what they exchange."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .agreement import refuse_disagreement, refuse_too_few
    from .ending import STOPPED, RankEnding, end_of_lost_contact
    from .gathering import gathered
    from .job_memory import JobMemory
    from .job_watch import watch_job
    from .joining import joined_ranks
    from .leaving import leave_job, threads_of_rank
    from .ranks import ALONE, Ranks
    from .shared_folders import refuse_unshared

__all__ = [
    "ALONE",
    "STOPPED",
    "JobMemory",
    "RankEnding",
    "Ranks",
    "end_of_lost_contact",
    "gathered",
    "joined_ranks",
    "leave_job",
    "refuse_disagreement",
    "refuse_too_few",
    "refuse_unshared",
    "threads_of_rank",
    "watch_job",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
