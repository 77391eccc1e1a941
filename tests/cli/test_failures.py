"""What ends a command: one line and an exit code for each kind, and a file for an unforeseen traceback."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from helpers.command_line import iisan_fast
from iisan_fast import cli
from iisan_fast.errors import InputError, Stopped
from iisan_fast.printable import LONGEST, one_line, printable

ESC = "\x1b[31m"


class FormError(ValueError):
    """Stands for the error of this name of the kernels."""


@pytest.fixture
def ends_by(monkeypatch, tmp_path):
    """Return a function that runs a command that raises an error."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(error: BaseException, *options: str):
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(cli.stats, "callback", fail)
        return iisan_fast(*options, "stats", tmp_path)

    return run


def tracebacks(tmp_path) -> list:
    return sorted(tmp_path.rglob("traceback-*.txt"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("x: bad"), "error: x: bad"),
        (InputError("two\nlines"), "error: two lines"),
        (FormError("no such form"), "error: no such form"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "error: /a/b: No space left on device; make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/a/b"), "error: /a/b: Disk quota exceeded; make room"),
        (OSError(errno.EROFS, "Read-only file system", "c"), "error: c: Read-only file system; choose a folder"),
        (PermissionError(errno.EACCES, "Permission denied", "c"), "error: c: Permission denied; check its owner"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "c"), "error: c: File name too long; choose a shorter"),
        (OSError(errno.EMFILE, "Too many open files", "c"), "error: c: Too many open files; raise the limit"),
        (OSError("without a number"), "error: without a number"),
        (OSError("No space left on device (os error 28)"), "error: No space left on device (os error 28); make room"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "error: Resource temporarily unavailable;"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "error: not enough memory ("),
        (MemoryError(), "error: not enough memory (MemoryError); "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "error: not enough memory ("),
        (RuntimeError("std::bad_alloc"), "error: not enough memory ("),
        (ImportError("libtorch.so: failed to map segment from shared object"), "error: not enough memory ("),
        (RuntimeError("can't start new thread"), "error: no thread can be started (can't start new thread)"),
        (ValueError("I/O error: No space left on device (os error 28)"), "error: I/O error: No space left on device"),
        (
            BaseException("called `Result::unwrap()` on an `Err` value: Os { code: 24, kind: X }"),
            "error: called `Result",
        ),
    ],
    ids=str,
)
def test_trouble_is_one_line(ends_by, tmp_path, error, line):
    result = ends_by(error)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1
    assert not tracebacks(tmp_path)


@pytest.mark.parametrize("error", [TypeError("not a float"), RuntimeError("shapes differ"), RecursionError("deep")])
def test_an_unforeseen_error_is_one_line_and_a_file(ends_by, tmp_path, error):
    result = ends_by(error)
    (file,) = tracebacks(tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    message = f"internal error: {type(error).__name__}: {error}; the traceback is in {file}; please report it\n"
    assert result.stderr == message
    text = file.read_text()
    assert "iisan-fast 0" in text and "Traceback (most recent" in text and f"{type(error).__name__}: {error}" in text


def test_verbose_prints_the_traceback_too(ends_by):
    result = ends_by(TypeError("not a float"), "--verbose")
    assert result.stderr.startswith("Traceback") and "please report it" in result.stderr.splitlines()[-1]


def test_the_oldest_of_twenty_tracebacks_is_replaced(ends_by, tmp_path):
    for number in range(23):
        ends_by(TypeError(f"error {number}"))
        for file in tracebacks(tmp_path):
            if f"error {number}\n" in file.read_text():
                os.utime(file, (number + 1, number + 1))
    texts = [file.read_text() for file in tracebacks(tmp_path)]
    assert len(texts) == 20
    assert {number for number in range(23) for text in texts if f"error {number}\n" in text} == set(range(3, 23))


def test_a_traceback_that_no_file_takes_is_printed(ends_by, tmp_path):
    (tmp_path / "state").write_text("a file where the folder would be")
    result = ends_by(TypeError("not a float"))
    assert result.returncode == 1 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "internal error: TypeError: not a float; no file for the traceback"
    )


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_ends_a_command_with_one_line(monkeypatch, tmp_path, name, code):
    before = signal.getsignal(getattr(signal, name))
    monkeypatch.setattr(cli.stats, "callback", lambda **_: signal.raise_signal(getattr(signal, name)))
    result = iisan_fast("stats", tmp_path)
    assert signal.getsignal(getattr(signal, name)) is before
    assert (result.returncode, result.stderr, result.stdout) == (code, "stopped\n", "")


def test_an_ignored_hangup_stays_ignored(monkeypatch, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(cli.stats, "callback", lambda **_: signal.raise_signal(signal.SIGHUP))
    try:
        assert iisan_fast("stats", tmp_path).returncode == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stopped_work_says_what_was_saved(ends_by):
    result = ends_by(Stopped("runs/a: saved after step 7", signal.SIGHUP))
    assert (result.returncode, result.stderr) == (129, "stopped: runs/a: saved after step 7\n")


@pytest.mark.parametrize("error", [InputError(f"{ESC}a\u202eb\udcff"), TypeError(f"{ESC}a\u202eb\udcff")])
def test_control_characters_of_a_message_are_escaped(ends_by, error):
    stderr = ends_by(error).stderr
    assert r"\x1b[31ma\u202eb\udcff" in stderr
    assert stderr.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢字 🙂", "plain ü 漢字 🙂"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\rb\x08c\x7fd\x9be", r"a\rb\x08c\x7fd\x9be"),
        ("\u202ea\u2066b\u200fc\ufeff", r"\u202ea\u2066b\u200fc\ufeff"),
        ("a\u2028b\U000e0041", r"a\u2028b\U000e0041"),
        ("\udcff", r"\udcff"),
        ("a\nb\tc\xa0d", "a\nb\tc\xa0d"),
        ("\U0001f469\u200d\U0001f4bb", "\U0001f469\u200d\U0001f4bb"),
    ],
)
def test_unsafe_characters_are_escaped_and_no_others(text, shown):
    assert printable(text) == shown


def test_a_long_message_loses_its_middle():
    message = one_line(f"begin {'x' * 20_000_000} end")
    assert message.startswith("begin ") and message.endswith(" end") and len(message) < LONGEST + 60
