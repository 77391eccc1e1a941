"""Lock files and the cache folder: waiting, killed processes, and systems without fcntl."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iisan_fast.errors import InputError
from iisan_fast.files import cache_folder, locked
from iisan_fast.kernels.cpu import library
from iisan_fast.states.store import Store

HOLD = """
import sys, time
from pathlib import Path
from iisan_fast.files import locked
with locked(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    time.sleep(60)
"""
HIDE = (
    "import sys; sys.modules.update(dict.fromkeys(['fcntl', 'resource'])); sys.argv = ['iisan-fast', *sys.argv[1:]]; "
)
HELP = HIDE + "import iisan_fast; from iisan_fast.cli import main; main()"
LOCK_TWICE = HIDE + (
    "from pathlib import Path; from iisan_fast.files import locked\n"
    "from iisan_fast.errors import InputError\n"
    "with locked(Path(sys.argv[1]), 'busy'):\n"
    "    try:\n"
    "        with locked(Path(sys.argv[1]), 'busy'):\n"
    "            print('two holders')\n"
    "    except InputError as error:\n"
    "        print(error)\n"
    "with locked(Path(sys.argv[1]), 'busy'):\n"
    "    print('free again')\n"
)


def test_a_lock_is_refused_while_it_is_held_and_free_after_the_block(tmp_path):
    path = tmp_path / ".lock"
    with locked(path, "someone writes"):
        with pytest.raises(InputError, match="^someone writes$"), locked(path, "someone writes"):
            pytest.fail("two holders")
        with locked(tmp_path / "other", "busy"):
            pass
    with locked(path, "busy"):
        assert path.is_file()


def test_an_error_in_the_block_frees_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock", "busy"):
        raise ZeroDivisionError
    with locked(tmp_path / "lock", "busy"):
        pass


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="busy"), locked(path, "busy"):
            pytest.fail("two holders")
    finally:
        holder.kill()
        holder.communicate()
    with locked(path, "busy"):
        pass


def test_one_writer_of_a_store_at_a_time(tmp_path):
    with Store(tmp_path / "cache", writable=True):
        assert (tmp_path / "cache" / "lock").is_file()
        with pytest.raises(InputError, match="another extraction is writing to this cache; wait for it to end"):
            Store(tmp_path / "cache", writable=True)
    Store(tmp_path / "cache", writable=True).close()


@pytest.mark.slow
@pytest.mark.parametrize("command", [(), ("stats",), ("caption",), ("extract",), ("train",), ("evaluate",)])
def test_the_command_line_needs_no_fcntl_and_no_resource(command):
    result = subprocess.run([sys.executable, "-c", HELP, *command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"Usage: {' '.join(['iisan-fast', *command])} ")


@pytest.mark.slow
def test_locks_work_without_fcntl(tmp_path):
    result = subprocess.run([sys.executable, "-c", LOCK_TWICE, tmp_path / "lock"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "busy\nfree again\n"), result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
def test_on_linux_the_cache_folder_is_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(library.CACHE_VARIABLE, raising=False)
    assert cache_folder() == tmp_path / ".cache" / "iisan-fast"
    assert library._folder() == tmp_path / ".cache" / "iisan-fast" / "compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "iisan-fast"
    assert library._folder() == tmp_path / "xdg" / "iisan-fast" / "compiled"
    monkeypatch.setenv(library.CACHE_VARIABLE, str(tmp_path / "named"))
    assert library._folder() == tmp_path / "named"


def test_a_user_without_a_home_gets_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("HOME", raising=False)
    with pytest.raises(RuntimeError, match="home"):
        cache_folder()
    assert not list(Path(tmp_path).iterdir())
