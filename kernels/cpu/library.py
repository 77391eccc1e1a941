"""Compile the C++ of `cpp/` into the user's cache, once on each machine, with the installed compiler; load and call it.

It is compiled for the processor that it runs on, so nothing compiled is shipped. Without a compiler the reference runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from platformdirs import user_cache_path

from ..threads import cores
from .structs import STRUCTS, CallStruct

CPP_FOLDER = Path(__file__).parent / "cpp"
FLAGS = ("-std=c++17", "-pthread", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
COMPILERS = ("c++", "g++", "clang++")
SCALARS = {torch.float32: "float", torch.float64: "double"}  # a library each
DTYPES = tuple(SCALARS)
PANEL = 16  # columns, as in cpp/panels.h
CACHE_VARIABLE = "IISAN_FAST_COMPILED"
NO_MEMORY, WRONG_SIZES = 1, 2  # codes, as in cpp/entry.h

log = logging.getLogger("iisan_fast.kernels")


class NoLibrary(Exception):
    """The library cannot be compiled or loaded; the message says why in one line."""


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the compiled functions for fp32 or fp64. Raises NoLibrary if they cannot be compiled or loaded."""
    loaded = _library(dtype)
    if isinstance(loaded, str):
        raise NoLibrary(loaded)
    return loaded


def run(function: Callable[..., int], arguments: ctypes.Structure) -> None:
    """Call a C++ function on the calling thread.

    Raises MemoryError if it cannot allocate memory, ValueError if the sizes in its arguments do not fit together.
    """
    if code := function(ctypes.byref(arguments)):
        raise _failure(code, _name(function), arguments)


def wrong_sizes(name: str, arguments: ctypes.Structure) -> ValueError:
    """Return the ValueError for a C++ function `name` that refuses the sizes in its arguments."""
    whole = (ctypes.c_int32, ctypes.c_int64)
    sizes = [f"{field} {getattr(arguments, field)}" for field, kind in arguments._fields_ if kind in whole]
    return ValueError(f"{name} in C++: expected sizes that fit, found {', '.join(sizes)}")


class Span(NamedTuple):
    """A range of the calls of a schedule."""

    first: int  # number of the first call
    last: int  # one more than the number of the last call

    def to(self, other: Span) -> Span:
        """Return the smallest range that includes both."""
        return Span(min(self.first, other.first), max(self.last, other.last))


AT_ONCE = Span(0, 0)  # the empty range: a call after it waits for no other


class Schedule:
    """A list of C++ calls; a call may wait for earlier calls. The numbers of the calls go on from run to run."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Create an empty schedule for the library of a dtype."""
        self._dtype = dtype
        self._ended = 0  # number of calls in earlier runs
        self.drop()

    def add(self, function: Callable[..., int], arguments: Sequence[ctypes.Structure], after: Span = AT_ONCE) -> Span:
        """Add a call of a function for each of the arguments; they wait for the calls `after`. Return their range."""
        work = ctypes.cast(function, ctypes.c_void_p).value
        before = len(self._calls)
        first, last = (max(0, number - self._ended) for number in after)  # calls of earlier runs have ended
        self._calls += [(work, ctypes.addressof(struct), first, last) for struct in arguments]
        self._arguments += arguments  # references, so that they live until the calls have ended
        self._names += [_name(function)] * len(arguments)
        return Span(self._ended + before, self._ended + before + len(arguments))

    def drop(self) -> None:
        """Forget the calls that were added since the last run."""
        self._calls: list[tuple[int | None, int, int, int]] = []
        self._arguments: list[ctypes.Structure] = []
        self._names: list[str] = []

    def run(self, threads: int | None = None, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Make all calls and wait for them; afterwards the schedule is empty.

        Args:
            threads: number of threads, the calling one included; None for one on each core.
            meanwhile: called while the other threads work; the calling thread joins them after it. Calls that it adds
                belong to the next run.

        A thread takes the next call in order as soon as it is free. Raises MemoryError if a call cannot allocate
        memory, ValueError if one refuses its sizes.
        """
        compiled = library(self._dtype)
        calls = (CallStruct * len(self._calls))(*self._calls)
        arguments = self._arguments
        names = self._names
        self._ended += len(calls)
        self.drop()
        running = ctypes.c_void_p()
        try:
            if code := compiled.begin(calls, len(calls), threads or cores(), ctypes.byref(running)):
                raise _failure(code, "begin", calls[0] if len(calls) else CallStruct())
            meanwhile()
        finally:  # even after an error: other threads may still read the calls' memory
            failure = compiled.end(running)
        if failure:
            number, code = failure >> 8, failure & 0xFF
            raise _failure(code, names[number], arguments[number])


def share_out(
    function: Callable[..., int], calls: Sequence[ctypes.Structure], dtype: torch.dtype, threads: int | None = None
) -> None:
    """Call a C++ function on each of the arguments in parallel and wait for all.

    Takes threads, and raises, as `Schedule.run` does.
    """
    schedule = Schedule(dtype)
    schedule.add(function, calls)
    schedule.run(threads)


def _failure(code: int, name: str, arguments: ctypes.Structure) -> Exception:
    """Return the exception for a code that a C++ function returned."""
    if code == WRONG_SIZES:
        return wrong_sizes(name, arguments)
    return MemoryError(f"{name} in C++ lacks memory for this batch")


def _name(function: Callable[..., int]) -> str:
    """Return the name of a C++ function."""
    return getattr(function, "__name__", "a function")


def why_no_library() -> str:
    """Return why the C++ cannot be compiled or loaded, or "" if it can. Compiles it if it is not in the cache."""
    loaded = _library(torch.float32)
    return loaded if isinstance(loaded, str) else ""


def why_no_compiler() -> str:
    """Return why no C++ compiler can be used, or "" if one can. Compiles nothing."""
    try:
        _compiler()
    except NoLibrary as error:
        return str(error)
    return ""


def compiler_version() -> str:
    """Return the first line that the compiler prints for --version. Raises NoLibrary if there is no compiler."""
    return next(iter(_version(_compiler()).decode(errors="replace").splitlines()), "a compiler without a version")


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | str:
    """Return the library of a dtype, or why there is none; cached, since compiling takes seconds."""
    try:
        compiler = [*_compiler(), *FLAGS, f"-DSCALAR={SCALARS[dtype]}"]
        path = _folder() / f"iisan-fast-{_key(compiler)}.so"
        if not path.exists():
            log.info("kernels: compiling C++ for this processor, once")
            _compile(compiler, path)
        return _with_equal_structs(ctypes.CDLL(str(path)))
    except NoLibrary as error:
        return str(error)
    except (OSError, RuntimeError) as error:  # a user without a home is a RuntimeError
        return f"the compiled library cannot be kept or loaded: {error}"


def _with_equal_structs(compiled: ctypes.CDLL) -> ctypes.CDLL:
    """Return the library. Raises NoLibrary if a class of structs.py differs in size from the C++ struct it mirrors."""
    for name, struct in STRUCTS.items():
        measure = getattr(compiled, f"size_of_{name}", None)
        if measure is None:
            raise NoLibrary(f"the compiled library does not say how large its {name} is; remove it")
        measure.restype = ctypes.c_int64
        if measure() != ctypes.sizeof(struct):
            sizes = f"{measure()} bytes in the compiled library, {ctypes.sizeof(struct)} in Python"
            raise NoLibrary(f"the struct {name} has {sizes}; structs.py does not mirror it")
    return compiled


def _compiler() -> list[str]:
    """Return the words of the compiler's command: of CXX, or else the first of `COMPILERS` that exists.

    Raises NoLibrary if there is none.
    """
    named = os.environ.get("CXX")
    for command in [named] if named else COMPILERS:
        try:
            words = shlex.split(command)
        except ValueError:
            words = []
        if words and shutil.which(words[0]):
            return words
    if named:
        raise NoLibrary(f"CXX names no program: {named!r}")
    raise NoLibrary(f"no C++ compiler is here ({', '.join(COMPILERS)})")


def _folder() -> Path:
    """Return the folder of compiled libraries. Nobody else may write there, since its files are run.

    Raises NoLibrary if others may.
    """
    named = os.environ.get(CACHE_VARIABLE)
    folder = Path(named or user_cache_path("iisan-fast", appauthor=False) / "compiled").resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owned = not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
    if not owned or folder.stat().st_mode & 0o022:
        raise NoLibrary(f"{folder}: others may write there; set {CACHE_VARIABLE} to a folder of your own")
    return folder


def _key(compiler: list[str]) -> str:
    """Return a digest of the sources, of how they are compiled, and of the processor."""
    parts = [path.name.encode() + path.read_bytes() for path in sorted(CPP_FOLDER.iterdir())]
    parts += [shlex.join(compiler).encode(), _version(compiler), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _version(compiler: list[str]) -> bytes:
    """Return what the compiler prints for --version."""
    return subprocess.run([compiler[0], "--version"], capture_output=True).stdout


def _processor() -> str:
    """Return the processor's instructions, if the system lists them, else its name."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:.*$", info.read_text(), re.M) if info.exists() else None
    return flags[0] if flags else f"{sys.platform} {platform.machine()} {platform.processor()}"


def _compile(compiler: list[str], path: Path) -> None:
    """Compile the library to `path`. Raises NoLibrary with the compiler's message if that fails.

    It compiles in a temporary folder and moves the file at the end, since another process may compile the same file, or
    this one may be killed.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        sources = sorted(CPP_FOLDER.glob("*.cpp"))
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        _run([[*compiler, "-c", str(source), "-o", str(to)] for source, to in zip(sources, objects)])
        linked = Path(folder) / path.name
        _run([[*compiler, "-shared", *map(str, objects), "-o", str(linked)]])
        os.replace(linked, path)


def _run(commands: list[list[str]]) -> None:
    """Run all commands at once. Raises NoLibrary with the first error that one of them prints."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    messages = [process.communicate()[1].splitlines() for process in running]
    for process, lines in zip(running, messages):
        if process.returncode:
            first = next((line for line in lines if "error" in line), lines[0] if lines else "nothing said")
            raise NoLibrary(f"{process.args[0]} exits with {process.returncode}: {first.strip()}")
