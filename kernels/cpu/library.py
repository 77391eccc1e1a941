"""Compile the C++ of `cpp/` into the user's cache, once on each machine, with the installed compiler, and load it.

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
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from platformdirs import user_cache_path

from .bounded_processes import run_all
from .compiled_files import CACHE_VARIABLE, Absent, CompiledFolder, NoLibrary, Unfit
from .structs import STRUCTS

CPP_FOLDER = Path(__file__).parent / "cpp"
FLAGS = ("-std=c++17", "-pthread", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
COMPILERS = ("c++", "g++", "clang++")
SCALARS = {torch.float32: "float", torch.float64: "double"}  # a library each
DTYPES = tuple(SCALARS)
PANEL = 16  # columns, as in cpp/panels.h
MOST_SECONDS = 300  # for the compiler; it takes about twenty
MOST_SECONDS_OF_VERSION = 30  # for the compiler to print its version

log = logging.getLogger("iisan_fast.kernels")


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the compiled functions for fp32 or fp64. Raises NoLibrary if they cannot be compiled or loaded."""
    loaded = _library(dtype)
    if isinstance(loaded, str):
        raise NoLibrary(loaded)
    return loaded


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
    return next(iter(_version(_compiler()).splitlines()), "a compiler without a version")


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | str:
    """Return the library of a dtype, or why there is none; cached, since compiling takes seconds."""
    try:
        compiler = [*_compiler(), *FLAGS, f"-DSCALAR={SCALARS[dtype]}"]
        with CompiledFolder(_folder()) as folder:
            return _as_mirrored(_loaded_from(folder, f"iisan-fast-{_key(compiler)}.so", compiler), dtype)
    except NoLibrary as error:
        return str(error)
    except (OSError, RuntimeError) as error:  # a user without a home is a RuntimeError
        return f"the compiled library cannot be kept or loaded: {error}"


def _loaded_from(folder: CompiledFolder, name: str, compiler: list[str]) -> ctypes.CDLL:
    """Load a library. It is compiled first if the folder has none that may be loaded.

    Raises NoLibrary if it cannot be compiled, OSError if it cannot be kept or loaded.
    """
    try:
        return folder.load(name)
    except (Absent, Unfit):
        pass  # another process may be compiling it
    with folder.locked(MOST_SECONDS + MOST_SECONDS_OF_VERSION):
        try:
            return folder.load(name)
        except Absent:
            log.info("kernels: compiling C++ for this processor, once")
        except Unfit as error:
            log.warning("kernels: %s; it is compiled again", error)
        with folder.working(name) as working:
            folder.keep(name, _compile(compiler, working))
    return folder.load(name)


def _as_mirrored(compiled: ctypes.CDLL, dtype: torch.dtype) -> ctypes.CDLL:
    """Return the library. Raises NoLibrary if its numbers are of another dtype than asked for, or its structs differ.

    A struct differs if its size is not that of the class in structs.py that mirrors it.
    """
    sizes = {name: ctypes.sizeof(struct) for name, struct in STRUCTS.items()}
    for name, expected in {"Scalar": dtype.itemsize, **sizes}.items():
        measure = getattr(compiled, f"size_of_{name}", None)
        if measure is None:
            raise NoLibrary(f"the compiled library does not say how large its {name} is; remove it")
        measure.restype = ctypes.c_int64
        if measure() != expected:
            found = f"{measure()} bytes in the compiled library, {expected} in Python"
            raise NoLibrary(f"the struct {name} has {found}; structs.py does not mirror it")
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
    """Return the path of the folder of compiled libraries. Raises RuntimeError if the user has no home folder."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named or user_cache_path("iisan-fast", appauthor=False) / "compiled").expanduser()


def _key(compiler: list[str]) -> str:
    """Return a digest of the sources, of how they are compiled, and of the processor."""
    parts = [path.name.encode() + path.read_bytes() for path in sorted(CPP_FOLDER.iterdir())]
    parts += [part.encode() for part in (shlex.join(compiler), _version(compiler), _processor())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _version(compiler: Sequence[str]) -> str:
    """Return what the compiler prints for --version. Raises NoLibrary if it does not end."""
    (ended,) = run_all([[*compiler, "--version"]], MOST_SECONDS_OF_VERSION)
    if ended.code is None:
        raise NoLibrary(f"{compiler[0]} --version does not end within {MOST_SECONDS_OF_VERSION} s")
    return ended.output


def _processor() -> str:
    """Return the processor's instructions, if the system lists them, else its name."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:.*$", info.read_text(), re.M) if info.exists() else None
    return flags[0] if flags else f"{sys.platform} {platform.machine()} {platform.processor()}"


def _compile(compiler: list[str], working: Path) -> Path:
    """Compile the library in a working folder; return its path.

    Raises NoLibrary with the compiler's message if that fails, and if it takes too long.
    """
    sources = sorted(CPP_FOLDER.glob("*.cpp"))
    objects = [working / f"{source.stem}.o" for source in sources]
    linked = working / "library.so"
    _run([[*compiler, "-c", str(source), "-o", str(to)] for source, to in zip(sources, objects)], working)
    _run([[*compiler, "-shared", *map(str, objects), "-o", str(linked)]], working)
    return linked


def _run(commands: list[list[str]], temporary: Path) -> None:
    """Run all commands at once. Raises NoLibrary with the first error that one of them prints.

    temporary: the folder for the commands' own temporary files.
    """
    environment = {**os.environ, "TMPDIR": str(temporary), "LC_ALL": "C"}  # messages in English
    for command, code, output in run_all(commands, MOST_SECONDS, environment):
        if code is None:
            raise NoLibrary(f"{command[0]} does not end within {MOST_SECONDS} s")
        if code:
            lines = output.splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else "nothing said")
            raise NoLibrary(f"{command[0]} exits with {code}: {first.strip()}")
