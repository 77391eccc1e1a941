"""Turn whatever ends a command into an exit code and one line on standard error."""

from __future__ import annotations

import logging
import platform
import re
import sys
import traceback
from pathlib import Path

import click
from platformdirs import user_log_path

from .. import __version__
from ..errors import InputError, Stopped, is_out_of_memory, system_error_number, with_remedy
from ..printable import one_line, printable
from ..ranks import STOPPED, RankEnding
from .verbosity import LIBRARY

INTERNAL, BAD_INPUT, INTERRUPTED = 1, 2, 130  # exit codes
INTERNAL_LABEL = "internal error"
SIGNALS = (129, 130, 143)  # exit codes of SIGHUP, SIGINT and SIGTERM
TRACEBACKS = 20  # files of tracebacks that are kept
NO_MORE_THREADS = re.compile(r"can't start new thread|pthread_create|thread creation failed", re.IGNORECASE)
MEMORY_REMEDY = (
    "free memory or raise its limit (ulimit -v, or that of the container), or try --table mapped, fewer --batch-users "
    "or a smaller --batch-size"
)


def exit_code(error: BaseException) -> int:
    """Print the line for what ended a command, and return the exit code.

    0 for none, 2 for bad input and for trouble of the machine, 128 + n for the signal n, 1 for an error of the program
    itself, whose traceback goes into a file.
    """
    ending = ending_of(error)
    if ending.line:
        print_line(ending.line)
    return ending.code


def ending_of(error: BaseException) -> RankEnding:
    """Return the exit code and the line for what ended a command. A traceback is written into its file."""
    if isinstance(error, SystemExit):
        return _ending_of_exit(error)
    if isinstance(error, Stopped):
        return RankEnding(128 + error.signal_number, STOPPED, str(error), is_in_order=True)
    if isinstance(error, (click.Abort, KeyboardInterrupt)):  # click turns Ctrl-C into Abort
        return RankEnding(INTERRUPTED, STOPPED)
    message = _known_trouble(error)
    if message is None:
        return _internal(error)
    return RankEnding(BAD_INPUT, "error", message)


def print_line(message: str) -> None:
    """Print a message as one line on standard error."""
    sys.stderr.write(f"{one_line(message)}\n")
    sys.stderr.flush()


def _ending_of_exit(error: SystemExit) -> RankEnding:
    """Return the end by a SystemExit, which says so if a signal caused it."""
    if error.code in SIGNALS:
        return RankEnding(error.code, STOPPED)
    if isinstance(error.code, str):
        return RankEnding(INTERNAL, error.code)
    return RankEnding(error.code or 0)


def _known_trouble(error: BaseException) -> str | None:
    """Return the message for bad input or trouble of the machine; None for an error of the program."""
    text = str(error)
    if isinstance(error, InputError):
        return text
    if isinstance(error, click.ClickException):
        return error.format_message()
    if type(error).__name__ == "FormError":  # raised by the kernels, whose module imports torch
        return text
    if is_out_of_memory(error):
        return f"not enough memory ({text or type(error).__name__}); {MEMORY_REMEDY}"
    if isinstance(error, OSError):
        return _trouble_with_file(error)
    if isinstance(error, RuntimeError) and NO_MORE_THREADS.search(text):
        return f"no thread can be started ({text}); raise the limit of processes (ulimit -u) or of memory (ulimit -v)"
    number = system_error_number(error)
    return None if number is None else with_remedy(text, number)


def _trouble_with_file(error: OSError) -> str:
    """Return the message for an error of the system: the file, what is wrong, and what to do."""
    text = error.strerror or str(error) or type(error).__name__
    if error.filename is not None:
        text = f"{error.filename}: {text}"
    return with_remedy(text, system_error_number(error))


def _internal(error: BaseException) -> RankEnding:
    """Write the traceback of an error of the program into a file, and return the end with the line that names it.

    The traceback goes to standard error if no file can be written, and also with --verbose.
    """
    details = "".join(traceback.format_exception(error))
    summary = f"{type(error).__name__}: {error}"
    try:
        file = _write_traceback(details)
    except (OSError, RuntimeError) as problem:  # RuntimeError: the user has no home folder
        sys.stderr.write(printable(details))
        remedy = f"no file for the traceback could be written ({problem}); please report it"
        return RankEnding(INTERNAL, INTERNAL_LABEL, f"{summary}; {remedy}")
    if logging.getLogger(LIBRARY).isEnabledFor(logging.DEBUG):
        sys.stderr.write(printable(details))
    return RankEnding(INTERNAL, INTERNAL_LABEL, f"{summary}; the traceback is in {file}; please report it")


def _write_traceback(details: str) -> Path:
    """Write a traceback into the user's folder of logs and return the file; it replaces the oldest of TRACEBACKS files.

    Raises OSError if the file cannot be written, RuntimeError if the user has no home folder.
    """
    folder = user_log_path("iisan-fast", appauthor=False) / "errors"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"traceback-{number:02d}.txt" for number in range(TRACEBACKS)]
    ages = {file: file.stat().st_mtime if file.exists() else 0.0 for file in files}
    file = min(files, key=ages.__getitem__)
    header = f"iisan-fast {__version__}, Python {platform.python_version()}, {platform.platform()}\n\n"
    file.write_text(header + details, encoding="utf-8", errors="backslashreplace")
    return file
