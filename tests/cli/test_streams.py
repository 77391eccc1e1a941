"""Standard streams that are closed, full, broken or without the letters, and text that would steer a terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from iisan_fast import progress, runtime
from iisan_fast.cli import main, output, streams

PROGRAM = Path(sys.executable).with_name("iisan-fast")
HOSTILE = "\x1b[2J[red]\u202eü"
SHOWN = r"\x1b[2J[red]\u202e"


def run(shell: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a line of bash, in which $P is the program."""
    environment = {**os.environ, "P": str(PROGRAM), **variables}
    return subprocess.run(["bash", "-c", shell], cwd=folder, env=environment, capture_output=True)


@pytest.mark.parametrize(
    ("shell", "code", "stdout", "stderr"),
    [
        ("$P stats d --json >&- 2>&-", 0, "", ""),
        ("$P stats d >/dev/full", 2, "", "error: standard output: No space left on device"),
        ("set -o pipefail; $P stats d | true", 141, "", ""),
    ],
)
@pytest.mark.slow
def test_standard_output_that_takes_nothing(toy_run, tmp_path, shell, code, stdout, stderr):
    (tmp_path / "d").symlink_to(toy_run[0])
    result = run(shell, tmp_path)
    assert (result.returncode, result.stdout.decode()) == (code, stdout)
    assert result.stderr.decode().startswith(stderr) and result.stderr.count(b"\n") == bool(stderr)


@pytest.mark.long
@pytest.mark.parametrize("redirection", [">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", "2>&1 >/dev/null | true", "2>&-"])
def test_a_run_is_whole_whatever_takes_its_text(toy_run, tmp_path, redirection):
    dataset, cache = toy_run
    settings = "--epochs 1 --batch-users 16 --embedding-dim 16 --bottleneck 8"
    outcome = run(f"$P train {dataset} --cache {cache} --out run {settings} {redirection}", tmp_path)
    assert (outcome.returncode, outcome.stderr) == (0, b"")
    for name in ("config.json", "test.json"):
        json.loads((tmp_path / "run" / name).read_text())
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    evaluated = run("$P evaluate run --json", tmp_path)
    assert json.loads(evaluated.stdout)["test"] == json.loads((tmp_path / "run" / "test.json").read_text())["test"]


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_without_the_letters(toy_run, tmp_path, encoding):
    (tmp_path / "ü漢").symlink_to(toy_run[0])
    result = run("$P stats ü漢; $P stats nowhere-ü漢", tmp_path, PYTHONIOENCODING=encoding)
    shown = "ü漢".encode(encoding, "backslashreplace")
    assert shown in result.stdout and b"users" in result.stdout
    assert result.stderr.startswith(b"error: nowhere-" + shown) and result.stderr.count(b"\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_tables_take_any_text_in_any_encoding(encoding):
    raw = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(raw, encoding)) as stdout:
        streams.prepare_streams()
        output.print_counts(HOSTILE, {f"name {HOSTILE}": f"value {HOSTILE}\udcff"})
        stdout.flush()
        text = raw.getvalue().decode(encoding)
    letter = "ü".encode(encoding, "backslashreplace").decode(encoding)
    assert f"{SHOWN}{letter}" in text and f"name {SHOWN}{letter}" in text
    assert rf"value {SHOWN}{letter}\udcff" in text
    assert "\x1b" not in text and "\u202e" not in text
    assert len({len(line) for line in text.splitlines()[1:]}) == 1  # the borders are in line


def test_a_failing_standard_output_is_an_error_and_a_closed_pipe_is_141():
    class Failing(io.StringIO):
        def __init__(self, error: OSError) -> None:
            super().__init__()
            self.error = error

        def flush(self) -> None:
            raise self.error

    table = Table("head")
    for show in (lambda: output.print_text("x"), lambda: output.print_table(table)):
        with redirect_stdout(Failing(OSError(28, "No space left on device"))), pytest.raises(output.InputError):
            show()
        with redirect_stdout(Failing(BrokenPipeError(32, "Broken pipe"))), pytest.raises(SystemExit) as end:
            show()
        assert end.value.code == 141


def test_standard_error_that_takes_nothing_stops_nothing(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    for path in ("/dev/full", writer):
        with streams.LastingFile(path, "w") as file:
            assert file.write(b"four") == 4
    with streams.LastingFile(tmp_path / "file", "w") as file:
        file.write(b"four")
    assert (tmp_path / "file").read_bytes() == b"four"


def test_a_busy_standard_error_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = ["bash", "-c", f"sleep 0.2; cat <&{reader} | wc -c"]
    with streams.LastingFile(writer, "w") as file:
        counter = subprocess.Popen(command, pass_fds=[reader], stdout=subprocess.PIPE)
        os.close(reader)
        content = memoryview(bytes(300_000))
        while len(content):
            content = content[file.write(content) :]
    assert int(counter.communicate()[0]) == 300_000


def test_logged_text_is_escaped():
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "item %s", (HOSTILE,), None)
    assert runtime.PrintableFormatter().format(record) == f"item {SHOWN}ü"


def test_progress_shows_text_from_data_literally(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    monkeypatch.setattr(logging.getLogger("iisan_fast"), "level", logging.INFO)
    with progress.progress_bar(HOSTILE, 2, "items") as advance:
        advance(1, note=f"note {HOSTILE}")
    shown = console.file.getvalue()
    assert f"{SHOWN}ü" in shown and f"note {SHOWN}ü" in shown and "\u202e" not in shown and "\x1b[2J" not in shown


def test_a_bad_argument_with_control_characters_is_escaped():
    with redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as end:
        main(["stats", "d", f"--{HOSTILE}"])
    assert end.value.code == 2 and SHOWN in stderr.getvalue() and "\x1b" not in stderr.getvalue()
