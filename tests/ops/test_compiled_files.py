"""The folder of compiled libraries: what is damaged, or what others may have changed, is never loaded."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers.compiler import needs_compiler
from iisan_fast.kernels.cpu import compiled_files, library
from iisan_fast.kernels.cpu.bounded_processes import MOST_OUTPUT, run_all
from iisan_fast.kernels.cpu.compiled_files import Absent, CompiledFolder, NoLibrary, Unfit

NAME = "iisan-fast-0123456789abcdef.so"
OTHER_NAME = "iisan-fast-fedcba9876543210.so"
NOBODY = 65534
PLANTED = """
#include <cstdlib>
__attribute__((constructor)) static void planted() { abort(); }
extern "C" int answer() { return 13; }
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[[str], Path]:
    """Return a function that compiles a source and returns the library; ours answers 42, the planted one aborts."""
    root = tmp_path_factory.mktemp("built")

    def build(source: str) -> Path:
        path = root / f"{abs(hash(source))}.so"
        if not path.exists():
            text = path.with_suffix(".cpp")
            text.write_text(source)
            subprocess.run([*library._compiler(), "-shared", "-fPIC", str(text), "-o", str(path)], check=True)
        return path

    return build


@pytest.fixture
def ours(built, tmp_path) -> Path:
    """Return a copy of a library whose function `answer` returns 42."""
    return Path(shutil.copy(built('extern "C" int answer() { return 42; }'), tmp_path / "ours.so"))


@pytest.fixture
def kept(ours, tmp_path) -> Path:
    """Return the file of a library that was kept in the folder `cache`."""
    keep(tmp_path / "cache", ours)
    return tmp_path / "cache" / NAME


def keep(cache: Path, compiled: Path, name: str = NAME) -> None:
    with CompiledFolder(cache) as folder, folder.working(name) as working:
        folder.keep(name, Path(shutil.copy(compiled, working / "library.so")))


def answer(cache: Path, name: str = NAME) -> int:
    with CompiledFolder(cache) as folder:
        return folder.load(name).answer()


def test_a_kept_library_is_private_whatever_the_mask_and_answers(ours, tmp_path):
    mask = os.umask(0)
    try:
        keep(tmp_path / "new" / "cache", ours)
    finally:
        os.umask(mask)
    cache = tmp_path / "new" / "cache"
    modes = [path.stat().st_mode & 0o777 for path in (cache.parent, cache, cache / NAME)]
    assert modes == [0o700, 0o700, 0o600]
    assert os.listdir(cache) == [NAME]
    assert answer(cache) == 42


def test_two_libraries_in_turn_are_not_taken_for_one_another(built, ours, tmp_path):
    """The loader knows a library by its open file's number, which must not be used again."""
    keep(tmp_path / "cache", ours)
    keep(tmp_path / "cache", built('extern "C" int answer() { return 43; }'), OTHER_NAME)
    assert [answer(tmp_path / "cache", name) for name in (NAME, OTHER_NAME, NAME)] == [42, 43, 42]


def as_link(path: Path, planted: Path) -> None:
    path.unlink()
    path.symlink_to(planted)


def as_hard_link(path: Path, planted: Path) -> None:
    os.link(path, path.parent / "second")


def as_fifo(path: Path, planted: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_planted(path: Path, planted: Path) -> None:
    path.write_bytes(planted.read_bytes())


def as_truncated(path: Path, planted: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def as_empty(path: Path, planted: Path) -> None:
    os.truncate(path, 0)


def as_altered(path: Path, planted: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def as_altered_at_the_end(path: Path, planted: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def as_library_of_another_name(path: Path, planted: Path) -> None:
    keep(path.parent, planted, OTHER_NAME)
    (path.parent / OTHER_NAME).replace(path)


DAMAGE = [
    (as_link, "it is a link"),
    (as_hard_link, "it has another name too"),
    (as_fifo, "it is no regular file"),
    (as_planted, "it is damaged: its SHA-256"),
    (as_truncated, "it is damaged: its SHA-256"),
    (as_empty, "it is damaged: it has 0 bytes"),
    (as_altered, "it is damaged: its SHA-256"),
    (as_altered_at_the_end, "it is damaged: its SHA-256"),
    (as_library_of_another_name, "it is damaged: its SHA-256"),
    (lambda path, _: path.chmod(0o620), "others may write to it"),
    (lambda path, _: path.chmod(0o602), "others may write to it"),
    pytest.param(lambda path, _: os.chown(path, NOBODY, -1), "it belongs to user 65534", marks=needs_root),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE)
def test_what_may_not_be_loaded_is_compiled_again_with_a_line(damage, reason, kept, ours, built, monkeypatch, caplog):
    damage(kept, built(PLANTED))
    with pytest.raises(Unfit) as refused:
        answer(kept.parent)
    assert str(refused.value).startswith(f"{kept}: {reason}") and "\n" not in str(refused.value)
    monkeypatch.setattr(library, "_compile", lambda _, working: Path(shutil.copy(ours, working / "library.so")))
    with caplog.at_level(logging.WARNING), CompiledFolder(kept.parent) as folder:
        assert library._loaded_from(folder, NAME, []).answer() == 42
    assert caplog.messages == [f"kernels: {refused.value}; it is compiled again"]
    assert answer(kept.parent) == 42


def test_a_folder_in_the_librarys_place_is_refused(kept, ours):
    kept.unlink()
    kept.mkdir()
    with pytest.raises(Unfit, match="it is no regular file"):
        answer(kept.parent)
    with pytest.raises(IsADirectoryError):
        keep(kept.parent, ours)
    assert sorted(os.listdir(kept.parent)) == [NAME]


def test_a_missing_library_is_absent(tmp_path):
    with pytest.raises(Absent, match="it is not compiled yet"):
        answer(tmp_path / "cache")


OPEN = [
    ("cache", 0o777, "others may write there"),
    ("cache", 0o770, "others may write there"),
    ("cache", 0o1777, "others may write there"),  # anybody can add a library
    ("above", 0o777, "others may write there"),
    ("above", 0o720, "others may write there"),
    ("above", 0o1777, ""),  # as /tmp: nobody else can rename our folder in it
    ("above", 0o711, ""),
]


@pytest.mark.parametrize(("place", "mode", "reason"), OPEN)
def test_no_folder_above_may_be_written_by_others(place, mode, reason, ours, tmp_path):
    cache = tmp_path / "above" / "middle" / "cache"
    keep(cache, ours)
    folder = {"cache": cache, "above": tmp_path / "above"}[place]
    folder.chmod(mode)
    try:
        if not reason:
            assert answer(cache) == 42
            return
        with pytest.raises(NoLibrary) as refused:
            answer(cache)
    finally:
        folder.chmod(0o700)
    assert str(refused.value) == f"{folder}: {reason}; set IISAN_FAST_COMPILED to a folder of your own"


@needs_root
@pytest.mark.parametrize("place", ["above", "cache"])
def test_no_folder_above_may_belong_to_another_user(place, ours, tmp_path):
    cache = tmp_path / "above" / "cache"
    keep(cache, ours)
    folder = {"cache": cache, "above": cache.parent}[place]
    os.chown(folder, NOBODY, -1)
    with pytest.raises(NoLibrary, match=f"{folder}: it belongs to user 65534, who may write there; set IISAN_FAST_C"):
        answer(cache)


def test_a_link_to_a_folder_of_ours_leads_there(kept, tmp_path):
    (tmp_path / "link").symlink_to(kept.parent)
    assert answer(tmp_path / "link") == 42


def test_a_folder_is_not_looked_up_again_once_it_is_open(kept, built, tmp_path):
    """Otherwise it could be exchanged after the check."""
    with CompiledFolder(kept.parent) as folder:
        kept.parent.rename(tmp_path / "moved")
        keep(tmp_path / "cache", built(PLANTED))
        assert folder.load(NAME).answer() == 42


def test_a_component_that_becomes_a_link_is_not_followed(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "resolve", lambda path: path)  # the link is set after the path was resolved
    (tmp_path / "link").symlink_to(kept.parent)
    with pytest.raises(OSError):
        answer(tmp_path / "link")


def test_without_a_name_for_open_files_a_copy_is_loaded(kept, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled_files, "OPEN_FILES", tmp_path / "none")
    assert answer(kept.parent) == 42
    assert os.listdir(kept.parent) == [NAME]


def test_what_killed_compilers_left_is_removed_by_exact_name_alone(kept):
    left = [f"{NAME}.a1b2c3d4", f"{OTHER_NAME}.________"]
    others = [f"{NAME}.backup00.old", f"{NAME}.BACKUP00", "tmpa1b2c3d4", "x" + left[0]]
    for name in (*left, *others):
        (kept.parent / name).mkdir()
        (kept.parent / name / "fold.o").write_bytes(b"")
    with CompiledFolder(kept.parent) as folder, folder.locked(1):
        assert sorted(os.listdir(kept.parent)) == sorted([NAME, "lock", *others])


def test_two_at_once_compile_once(ours, tmp_path, monkeypatch):
    compiled = []

    def compile_slowly(_: list[str], working: Path) -> Path:
        compiled.append(working)
        time.sleep(0.3)
        return Path(shutil.copy(ours, working / "library.so"))

    def load() -> int:
        with CompiledFolder(tmp_path / "cache") as folder:
            return library._loaded_from(folder, NAME, []).answer()

    monkeypatch.setattr(library, "_compile", compile_slowly)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(load) for _ in range(3)]
        assert [answer.result(timeout=20) for answer in answers] == [42] * 3
    assert len(compiled) == 1
    assert sorted(os.listdir(tmp_path / "cache")) == [NAME, "lock"]


def test_waiting_for_another_process_ends(tmp_path):
    cache = tmp_path / "cache"
    refused = pytest.raises(NoLibrary, match="another process is compiling and does not end")
    with CompiledFolder(cache) as first, first.locked(1), CompiledFolder(cache) as second, refused, second.locked(0.1):
        pytest.fail("two holders")


def test_a_file_system_without_locks_is_no_obstacle(ours, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "cache" / f"{NAME}.a1b2c3d4").mkdir(parents=True)  # another process may be at work there
    with CompiledFolder(tmp_path / "cache") as folder, folder.locked(1):
        keep(tmp_path / "cache", ours)
    assert answer(tmp_path / "cache") == 42
    assert sorted(os.listdir(tmp_path / "cache")) == [NAME, f"{NAME}.a1b2c3d4", "lock"]


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Return a function that makes a script the compiler, with a cache of its own, and returns the cache's folder."""
    library._library.cache_clear()

    def use(script: str) -> Path:
        path = tmp_path / "fake-c++"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setenv("CXX", str(path))
        monkeypatch.setenv(library.CACHE_VARIABLE, str(tmp_path / "cache"))
        return tmp_path / "cache"

    yield use
    library._library.cache_clear()


VERSION = 'for word; do [ "$word" != --version ] || exec echo fake 1.0; done'


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z" if os.path.isdir("/proc/self") else True


def test_a_compiler_that_hangs_is_killed_with_its_children(fake_compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "MOST_SECONDS", 0.5)
    cache = fake_compiler(f"{VERSION}\nsleep 600 & echo $! >>{tmp_path}/children\nwait")
    assert library.why_no_library() == f"{tmp_path}/fake-c++ does not end within 0.5 s"
    children = [int(number) for number in (tmp_path / "children").read_text().split()]
    until = time.monotonic() + 5
    while any(map(is_running, children)) and time.monotonic() < until:
        time.sleep(0.01)
    assert children and not any(map(is_running, children))
    assert os.listdir(cache) == ["lock"]


def test_a_compiler_without_a_version_in_time_is_a_reason(fake_compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "MOST_SECONDS_OF_VERSION", 0.3)
    fake_compiler("exec sleep 600")
    assert library.why_no_library() == f"{tmp_path}/fake-c++ --version does not end within 0.3 s"


def test_a_child_that_keeps_the_output_open_is_not_waited_for(tmp_path):
    began = time.monotonic()
    (ended,) = run_all([["sh", "-c", "sleep 600 & exit 0"]], 0.3)
    assert ended.code is None and time.monotonic() - began < 20


def test_of_endless_output_the_beginning_is_kept():
    endless, short = run_all([["sh", "-c", "while :; do echo error; done"], ["sh", "-c", "echo x; exit 3"]], 0.5)
    assert endless.code is None and len(endless.output) == MOST_OUTPUT and endless.output.startswith("error\n")
    assert (short.code, short.output) == (3, "x\n")


def test_an_error_while_programs_run_kills_them(tmp_path):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        run_all([["sh", "-c", f"echo $$ >{tmp_path}/number; sleep 600"], [str(tmp_path / "no-such-program")]], 600)
    assert time.monotonic() - began < 20


@pytest.mark.long
def test_a_killed_process_leaves_no_lock_and_what_it_left_is_removed(ours, tmp_path):
    """Also if it is killed while it compiles."""
    program = f"""
import sys, time
from pathlib import Path
from iisan_fast.kernels.cpu.compiled_files import CompiledFolder
with CompiledFolder(Path({str(tmp_path / "cache")!r})) as folder, folder.locked(1), folder.working({NAME!r}):
    print("working", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "working\n"
    finally:
        process.kill()
        process.communicate()
    assert len(os.listdir(tmp_path / "cache")) == 2
    with CompiledFolder(tmp_path / "cache") as folder, folder.locked(1):
        keep(tmp_path / "cache", ours)
    assert sorted(os.listdir(tmp_path / "cache")) == [NAME, "lock"]
    assert answer(tmp_path / "cache") == 42
