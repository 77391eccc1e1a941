"""The C++ of `cpp/`, compiled once a machine by the compiler at hand and kept in the user's cache.

Like Triton's kernels it is compiled for the processor that it runs on, so nothing compiled is shipped. Without a
compiler the forms in PyTorch do the same work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-std=c++17", "-O3", "-g", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
CACHE_VARIABLE = "IISAN_FAST_COMPILED"


class NoLibrary(Exception):
    """Why there is none, in one line."""


def library() -> ctypes.CDLL:
    """The compiled functions. Raises NoLibrary where they cannot be compiled or loaded."""
    found = _library()
    if isinstance(found, str):
        raise NoLibrary(found)
    return found


def why_not() -> str:
    """What keeps the library from this machine, or nothing."""
    found = _library()
    return found if isinstance(found, str) else ""


def dtype_name(dtype: torch.dtype) -> str:
    """How the functions for a dtype end."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none; asked once, since a compiler takes seconds."""
    try:
        compiler = _compiler()
        path = _folder() / f"iisan-fast-{_key(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except NoLibrary as error:
        return str(error)
    except OSError as error:
        return f"the compiled library cannot be kept or loaded: {error}"


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    for command in [named] if named else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise NoLibrary(f"CXX names no program: {named!r}" if named else "no C++ compiler is here (c++, g++, clang++)")


def _folder() -> Path:
    """Where compiled libraries are kept: readable by this user alone, who runs what lies there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "iisan-fast")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _key(compiler: list[str]) -> str:
    """What the library depends on: its sources, how they are compiled, and the processor."""
    parts = [path.name.encode() + path.read_bytes() for path in sorted(SOURCES.iterdir())]
    version = subprocess.run([*compiler, "--version"], capture_output=True).stdout
    parts += [shlex.join([*compiler, *FLAGS]).encode(), version, _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """The instructions that it has, where the system tells; else its name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*:.*$", info.read_text(), re.M) if info.exists() else None
    return found[0] if found else f"{sys.platform} {platform.machine()} {platform.processor()}"


def _compile(compiler: list[str], path: Path) -> None:
    """Into a file of its own first: another process may be compiling the same, and either may be ended."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*compiler, *FLAGS, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
            raise NoLibrary(f"{compiler[0]} exits with {done.returncode}: {lines[0].strip()}")
        os.replace(made, path)
