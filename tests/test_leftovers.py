"""Check that temporary files of killed writes are removed, and that nothing of anybody else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from iisan_fast.errors import InputError
from iisan_fast.files import remove_leftovers, whole_file, whole_folder, write_atomically
from iisan_fast.training.checkpoints import write_tensors

HALF_WRITTEN = """
import sys, time
from pathlib import Path
from iisan_fast.files import whole_file, whole_folder

with (whole_folder if sys.argv[1] == "folder" else whole_file)(Path(sys.argv[2])) as temporary:
    (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
    print(temporary.parent.name, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """Return a function that starts a process which is writing a file or folder, and returns it."""
    pytest.importorskip("fcntl")
    started = []

    def start(kind: str) -> tuple[subprocess.Popen, Path]:
        command = [sys.executable, "-c", HALF_WRITTEN, kind, str(tmp_path / "target")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, tmp_path / process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_at_the_next_write_and_what_a_living_one_writes_stays(tmp_path, writer, kind):
    killed, leftover = writer(kind)
    _, half_written = writer(kind)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert leftover.exists() and half_written.exists()
    with (whole_folder if kind == "folder" else whole_file)(tmp_path / "target") as temporary:
        assert {path.name for path in tmp_path.iterdir()} == {half_written.name, temporary.parent.name}
        (temporary / "whole" if kind == "folder" else temporary).write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {half_written.name, "target"}


def test_only_names_that_this_program_alone_makes_are_removed(tmp_path):
    pytest.importorskip("fcntl")
    names = [
        ".target.k2j3_0ab",  # by 8 letters, as tempfile does for everybody
        ".target.original",
        ".target.iisan-fast-",
        ".target.iisan-fast-backup",
        ".target.iisan-fast-UPPERCAS",
        ".target2.iisan-fast-k2j3_0ab",
        "target.iisan-fast-k2j3_0ab",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".target.iisan-fast-linkto_a").symlink_to(tmp_path / names[0])
    (tmp_path / ".target.iisan-fast-a_file_1").write_text("a user's")
    os.mkfifo(tmp_path / ".target.iisan-fast-fifo_fif")
    before = {path.name for path in tmp_path.iterdir()}
    (tmp_path / ".target.iisan-fast-k2j3_0ab").mkdir()
    (tmp_path / ".target.iisan-fast-k2j3_0ab" / "target").write_text("half")
    remove_leftovers(tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root")
def test_a_file_of_another_user_stays(tmp_path):
    path = tmp_path / ".target.iisan-fast-k2j3_0ab"
    path.mkdir()
    os.chown(path, 12345, 12345)
    write_atomically(tmp_path / "target", b"whole")
    assert path.exists()


def test_what_a_library_writes_beside_a_file_lies_in_the_temporary_folder(tmp_path):
    """safetensors writes .tmpXXXXXX, which it renames; a kill would leave that."""
    with whole_file(tmp_path / "target") as temporary:
        assert [path.name for path in tmp_path.iterdir()] == [temporary.parent.name]
        write_tensors(temporary, {}, {"epoch": 1}, tmp_path / "target")
        (temporary.parent / ".tmpA3b").write_text("half")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_failed_write_leaves_nothing(tmp_path):
    for context in (whole_file, whole_folder):
        with pytest.raises(InputError), context(tmp_path / "target"):
            raise InputError("no")
    assert not list(tmp_path.iterdir())
