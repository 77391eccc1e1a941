"""Refuse a job whose ranks would compute different things: other code, other data, other settings, or too few rows."""

from __future__ import annotations

import functools
import hashlib
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError, first_few
from .ranks import Ranks

SOURCES = ("*.py", "*.cpp", "*.h")
LONGEST_VALUE = 20  # characters of a value in a message


def refuse_disagreement(ranks: Ranks, values: Mapping[str, Any]) -> None:
    """Raise InputError on all ranks if a value is not the same on all of them. Every rank calls it.

    values: by a name that a user understands, JSON values: digests, numbers, or settings as a mapping, of any depth.
    Leave out what may differ, such as the places of files; give the digests of their content. The message names the
    first rank that differs from rank 0, its machine, and what differs: of a mapping the dotted names, with both values.

        refuse_disagreement(ranks, {"dataset": digest, "settings": to_dict(config), "device": device.type})
    """
    if not ranks.several:
        return
    reports = ranks.from_all((socket.gethostname(), _flat(values)))
    expected = reports[0][1]
    for rank, (machine, actual) in enumerate(reports):
        names = [name for name in {**expected, **actual} if expected.get(name) != actual.get(name)]
        if names:
            phrases = [
                f"{name} is {_short(actual.get(name))} there, {_short(expected.get(name))} here" for name in names
            ]
            raise InputError(
                f"rank {rank} on {machine} differs from rank 0: {first_few(phrases, len(phrases))}; "
                "start all ranks with the same code, data and settings"
            )


def refuse_other_code(ranks: Ranks) -> None:
    """Raise InputError on all ranks if they run other code of this package, or other versions of torch or numpy."""
    if not ranks.several:
        return
    import numpy
    import torch

    versions = {"iisan-fast": __version__, "torch": torch.__version__, "numpy": numpy.__version__}
    refuse_disagreement(ranks, {**versions, "iisan-fast's code": code_digest()})


def refuse_too_few(ranks: Ranks, count: int, what: str) -> None:
    """Raise InputError if there are fewer rows than ranks. count: equal on all ranks. what: their name, as "users"."""
    if count < ranks.count:
        raise InputError(f"{what}: expected at least one for each of {ranks.count} ranks, found {count}; start fewer")


@functools.cache
def code_digest() -> str:
    """Return the sha256 (hex) of the package's sources, with those of the ops."""
    package = Path(__file__).parents[1]
    is_installed = (package / "kernels").is_dir()
    folders = [package] if is_installed else [package, package.with_name("kernels")]  # beside it in a checkout
    digest = hashlib.sha256()
    for folder in folders:
        files = sorted(file for pattern in SOURCES for file in folder.rglob(pattern))
        for file in files:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Return the values of nested mappings as JSON, by their dotted names."""
    result: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{before}{name}.")
        else:
            result[f"{before}{name}"] = json.dumps(value, default=str)
    return result


def _short(value: str | None) -> str:
    """Return a value, cut to LONGEST_VALUE characters, or the word for none."""
    if value is None:
        return "missing"
    return value if len(value) <= LONGEST_VALUE else f"{value[: LONGEST_VALUE - 3]}..."
