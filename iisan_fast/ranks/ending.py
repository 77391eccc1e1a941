"""Describe how a rank's work has ended: an exit code, and the line that is printed once for all ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass

STOPPED = "stopped"  # the label of work that a signal has ended
LOST_CODE = 2  # the exit code of a job that has lost a rank
GO_ON = "start the job again; a training goes on by --resume, or at once by torchrun --max-restarts"
# In errors of collectives whose other end has gone.
LOST_CONTACT = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket (timeout|error)", re.IGNORECASE
)
ERRORS_OF_CONTACT = ("DistBackendError", "DistNetworkError", "DistStoreError")


@dataclass(frozen=True)
class RankEnding:
    """The end of a rank's work, or of the job's."""

    code: int = 0
    label: str = ""  # such as "error"; empty if nothing is printed
    message: str = ""
    is_in_order: bool = False  # a signal has stopped it, and rank 0 may still write
    is_consequence: bool = False  # an exchange failed, which another rank may have caused

    @property
    def line(self) -> str:
        """Return the text that is printed; empty if there is none."""
        return ": ".join(part for part in (self.label, self.message) if part)

    def of_rank(self, rank: int, machine: str) -> RankEnding:
        """Return the end with the rank that it came from in its message."""
        if not self.label:
            return self
        where = f"rank {rank} on {machine}"
        return RankEnding(self.code, self.label, f"{where}: {self.message}" if self.message else where)


def end_of_lost_rank(rank: int, machine: str) -> RankEnding:
    """Return the end of a job whose rank has gone without a word."""
    reason = "was killed, has crashed, or its machine cannot be reached"
    return RankEnding(LOST_CODE, "error", f"rank {rank} on {machine} is lost: it {reason}; {GO_ON}")


def end_of_lost_contact(error: BaseException) -> RankEnding | None:
    """Return the end of a rank whose exchange with others failed; None for any other error."""
    text = str(error)
    is_of_contact = type(error).__name__ in ERRORS_OF_CONTACT
    if not is_of_contact and not (isinstance(error, RuntimeError) and LOST_CONTACT.search(text)):
        return None
    first_line = next(iter(text.splitlines()), type(error).__name__)
    message = f"an exchange between ranks failed ({first_line}); {GO_ON}"
    return RankEnding(LOST_CODE, "error", message, is_consequence=True)
