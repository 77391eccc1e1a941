"""Hold the result of checking the files of a cache or of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Damage:
    """One damaged part of a file."""

    where: str  # the file, and the view and item or the tensor in it: "states.lmdb: view 'title', item 'B00A'"
    problem: str  # "the checksum does not fit"
    remedy: str  # what to do: "iisan-fast extract encodes it again"


@dataclass
class Verified:
    """The result of `verify` for a folder."""

    path: Path
    kind: str  # "cache" or "run"
    checked: int = 0  # entries and tensors whose checksum was compared, and other files that were read
    added: int = 0  # entries and tensors that had no checksum and have one now
    unchecked: int = 0  # entries and tensors that have no checksum still
    damage: list[Damage] = field(default_factory=list)
