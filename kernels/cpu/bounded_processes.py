"""Run other programs, such as a compiler, within a time, and keep only the beginning of what they print."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

MOST_OUTPUT = 1 << 16  # bytes that are kept of a program's output; the rest is read and dropped


class Ended(NamedTuple):
    """A program that has ended, or was ended because its time was over."""

    command: Sequence[str]
    code: int | None  # exit status; None if its time was over
    output: str  # the beginning of what it printed


def run_all(
    commands: Sequence[Sequence[str]], seconds: float, environment: Mapping[str, str] = os.environ
) -> list[Ended]:
    """Run all commands at once and wait for them, together at most `seconds`.

    A program whose time is over is killed, with the programs that it started. So are all if this call is interrupted.
    Raises OSError if a program cannot be started.
    """
    until = time.monotonic() + seconds
    running: list[_Running] = []
    try:
        for command in commands:
            running.append(_Running(command, environment))
        _read_all(running, until)
        return [program.ended(until) for program in running]
    finally:
        for program in running:
            program.kill()


class _Running:
    """A program that runs in a process group of its own, and the beginning of its output."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None) -> None:
        """Start the program."""
        self.command = command
        self.output = bytearray()
        self.is_read = False  # True when it has closed its output, as it does at its end
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.pipe = self._process.stdout

    def read(self) -> None:
        """Read what the program has printed by now."""
        chunk = os.read(self.pipe.fileno(), MOST_OUTPUT)
        self.is_read = not chunk
        self.output += chunk[: MOST_OUTPUT - len(self.output)]

    def ended(self, until: float) -> Ended:
        """Wait for the end of the program; kill it at the time `until`."""
        code = None
        if self.is_read:
            try:
                code = self._process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
        self.kill()
        return Ended(self.command, code, self.output.decode(errors="replace"))

    def kill(self) -> None:
        """Kill the program and those that it started, unless it has ended."""
        if self._process.returncode is None:  # not waited for yet: no other program can have its number
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.pipe.close()


def _read_all(running: Sequence[_Running], until: float) -> None:
    """Read the output of all programs until they close it, or until the time `until`."""
    with selectors.DefaultSelector() as open_pipes:
        for program in running:
            open_pipes.register(program.pipe, selectors.EVENT_READ, program)
        while open_pipes.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in open_pipes.select(left):
                key.data.read()
                if key.data.is_read:
                    open_pipes.unregister(key.fileobj)
