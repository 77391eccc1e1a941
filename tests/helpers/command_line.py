"""The command line, called in this process."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from iisan_fast.cli import main


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def iisan_fast(*arguments: object) -> Result:
    """Run the program in this process: a new process would load torch again, which takes seconds."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return Result(end.value.code or 0, out.getvalue(), err.getvalue())


def refused(*arguments: object) -> str:
    """Return the one line with which the command answers bad input."""
    result = iisan_fast(*arguments)
    assert result.returncode == 2 and not result.stdout, result
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    return result.stderr
