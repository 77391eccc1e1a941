"""Watch over a job: whatever ends the work of one rank ends that of all within seconds, and is printed once.

A thread of each rank listens to the channels between rank 0 and the others. Rank 0 prints the line, and tells the
others to end. Where rank 0 itself is lost, the first rank of each machine prints that. A thread ends its process at
once, whatever the main thread does: every file of this project is written under a temporary name and renamed when it is
whole, so nothing half-written is left under its name.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..launcher import JobPlace
from .ending import STOPPED, RankEnding, end_of_lost_rank
from .job_channel import SECONDS, Channel, connect_to_first, open_channels
from .meeting import job_store

if TYPE_CHECKING:
    from torch.distributed import Store

Say = Callable[[str], None]  # prints a line for the user
GRACE_SECONDS = 1.0  # in which rank 0's work may end by the same error as another rank's
STOPPING_SECONDS = 10.0  # the same where a signal stopped the other rank: rank 0 may have it too, and save
CAUSE_SECONDS = 5.0  # in which the cause of a failed exchange becomes known, and rank 0 answers
SAVING_SECONDS = 600.0  # in which rank 0 may still write after a signal; launchers kill it sooner


class FirstRankWatch:
    """The watch of rank 0, which hears of every rank's end."""

    def __init__(self, place: JobPlace, store: Store, say: Say) -> None:
        """Open the channels."""
        self.place = place
        self._say = say
        self._changed = threading.Condition()
        self._failure: RankEnding | None = None  # the first of another rank, with its place
        self._reported: RankEnding | None = None  # the same, as that rank has it
        self._is_leaving = False
        self._is_over = False  # the thread has printed the end
        self._channels: dict[int, Channel] = {}  # of ranks at work
        self._machines: dict[int, str] = {}
        self._ended: set[int] = set()  # ranks whose work is done
        self._server, self._token = open_channels(place, store)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        threading.Thread(target=self._listen, name="watch of the job", daemon=True).start()

    def leave(self, ending: RankEnding) -> int:
        """Print how the job has ended, if there is something to say, end the other ranks, and return the exit code.

        Work that succeeded waits until all ranks have ended. Where another rank failed first, its end is the job's.
        """
        with self._changed:
            while self._is_over:
                self._changed.wait()  # for the thread, which ends this process
            self._is_leaving = True
            if ending.code == 0:
                self._changed.wait_for(lambda: self._failure or len(self._ended) == self.place.count - 1)
            elif ending.is_consequence:
                self._changed.wait_for(lambda: self._failure, CAUSE_SECONDS)
            cause = self._failure
        is_the_same = self._reported is not None and self._reported.line == ending.line
        return self._end(ending if cause is None or is_the_same else cause)

    def _end(self, ending: RankEnding) -> int:
        """Print the end of the job, send it to the other ranks, and return its exit code."""
        if ending.line:
            self._say(ending.line)
        for channel in list(self._channels.values()):
            channel.send({"end": ending.code})
        return ending.code

    def _listen(self) -> None:
        """Accept the other ranks, and read what they send."""
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    self._accept()
                else:
                    self._take(key.data)

    def _accept(self) -> None:
        """Accept a rank that knows the token."""
        try:
            connection, _ = self._server.accept()
        except OSError:
            return
        connection.settimeout(SECONDS)
        channel = Channel(connection)
        hello = next(channel.messages(), {})
        if hello.get("token") != self._token:
            connection.close()
            return
        rank = hello["rank"]
        self._machines[rank] = hello["machine"]
        self._channels[rank] = channel
        channel.send({"machine": socket.gethostname()})
        self._selector.register(connection, selectors.EVENT_READ, rank)

    def _take(self, rank: int) -> None:
        """Read the messages of a rank, or notice that it has gone."""
        channel = self._channels[rank]
        messages = channel.read()
        if messages is None:
            self._selector.unregister(channel.connection)
            del self._channels[rank]
            if rank not in self._ended:
                lost = end_of_lost_rank(rank, self._machines[rank])
                self._fail(lost, lost)
        for message in messages or ():
            ending = RankEnding(**message["ending"])
            if ending.code == 0 or ending.is_in_order:
                with self._changed:
                    self._ended.add(rank)
                    self._changed.notify_all()
            else:
                self._fail(ending.of_rank(rank, self._machines[rank]), ending)

    def _fail(self, ending: RankEnding, reported: RankEnding) -> None:
        """Note the first failure of another rank, and end the process soon. reported: as the rank has it."""
        with self._changed:
            if self._failure is None:
                self._failure = ending
                self._reported = reported
                seconds = STOPPING_SECONDS if ending.label == STOPPED else GRACE_SECONDS
                threading.Timer(seconds, self._end_process).start()
            self._changed.notify_all()

    def _end_process(self) -> None:
        """End this process, unless its work has ended by now."""
        with self._changed:
            if self._is_leaving:
                return
            self._is_over = True
        os._exit(self._end(self._failure))


class OtherRankWatch:
    """The watch of a rank other than 0, which tells rank 0 its end and learns the job's."""

    def __init__(self, place: JobPlace, store: Store, say: Say) -> None:
        """Connect to rank 0. Raises InputError if it cannot be reached."""
        self._say = say
        self._speaks_without_first = place.local_rank == 0 or place.rank == 1
        self._is_leaving = threading.Event()
        self._is_known = threading.Event()  # the end of the job, or of rank 0
        self._code: int | None = None  # of the job; None if rank 0 has gone without a word
        self._channel, self._first_machine = connect_to_first(place, store)
        threading.Thread(target=self._listen, name="watch of the job", daemon=True).start()

    def leave(self, ending: RankEnding) -> int:
        """Send how this rank's work has ended to rank 0, and return the exit code.

        Unless the work succeeded it waits until rank 0 has printed the line. If that does not answer, this rank prints.
        """
        self._is_leaving.set()
        if not ending.is_consequence or not self._is_known.wait(CAUSE_SECONDS):
            self._channel.send({"ending": asdict(ending)})
        if ending.code == 0:
            return 0
        self._is_known.wait(SAVING_SECONDS if ending.is_in_order else CAUSE_SECONDS)
        if self._code is not None:
            return self._code
        if not ending.is_consequence or not self._is_known.is_set():
            self._say(ending.line)
        elif self._speaks_without_first:
            self._say(end_of_lost_rank(0, self._first_machine).line)
        return ending.code

    def _listen(self) -> None:
        """Wait for the end of the job, and end this process by it, unless its work has ended already."""
        for message in self._channel.messages():
            self._code = message["end"]
        self._is_known.set()
        if self._is_leaving.is_set():
            return
        code = self._code
        if code is None:
            lost = end_of_lost_rank(0, self._first_machine)
            code = lost.code
            if self._speaks_without_first:
                self._say(lost.line)
        os._exit(code)


def watch_job(place: JobPlace, say: Say) -> FirstRankWatch | OtherRankWatch:
    """Meet the other ranks, and watch over the job from now on. say: prints a line for the user, also in a thread.

    Raises InputError if the ranks do not come together.
    """
    store = job_store(place)
    return FirstRankWatch(place, store, say) if place.rank == 0 else OtherRankWatch(place, store, say)
