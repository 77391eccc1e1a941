"""Find the files of a source in its folder, and the parts of a given split by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ....errors import InputError, first_few
from ....files import refuse_irregular
from ..table import PARTS

TRAINING, VALIDATION, TEST = PARTS
PART_WORDS = {
    **dict.fromkeys(("train", "training"), TRAINING),
    **dict.fromkeys(("valid", "validation", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")


def find(folder: Path, *patterns: str) -> Path | None:
    """Return the file that matches the first pattern with a match. Raises InputError if several files match it."""
    if not folder.is_dir():
        what = "is a file; name the folder that holds it" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}")
    for pattern in patterns:
        matches = sorted(folder.glob(pattern))
        if len(matches) > 1:
            names = first_few((match.name for match in matches), len(matches))
            raise InputError(f"{folder}: expected one {pattern}, found {names}; give each dataset a folder of its own")
        if matches:
            return matches[0]
    return None


def unpacked(source: Path) -> Path:
    """Return a file or a folder. Raises InputError if there is none, or if it is an archive."""
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if source.name.lower().endswith(ARCHIVES) and not source.is_dir():
        raise InputError(f"{source}: is an archive; unpack it, and name the folder")
    return source


def is_utf_8(path: Path) -> bool:
    """Return True if a file is UTF-8. Raises InputError if it is no regular file."""
    refuse_irregular(path)
    try:
        with path.open(encoding="utf-8") as lines:
            for _ in lines:
                pass
    except UnicodeDecodeError:
        return False
    return True


def in_natural_order(path: Path) -> list[tuple[int, str]]:
    """Return the key that sorts names by the numbers in them, so that part10 comes after part2."""
    pieces = re.split(r"([0-9]+)", path.name)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def with_parts(
    where: Path, paths: Sequence[Path], pieces: Sequence[str], example: str
) -> list[tuple[Path, str | None]]:
    """Return files with the parts of a split that they hold, training first; None if their names say none.

    pieces: the word of each name that may say a part. example: names as they are expected. Raises InputError if only
    some are parts of a split, or if two are the same part.
    """
    parts = [PART_WORDS.get(piece.lower()) for piece in pieces]
    split = [part for part in parts if part is not None]
    if not {*split} - {TRAINING}:
        return [(path, None) for path in paths]
    if len(split) < len(parts) or len({*split}) < len(split):
        names = first_few((path.name for path in paths), len(paths))
        raise InputError(f"{where}: expected {example}, found {names}; leave one of each, or name the file to read")
    return sorted(zip(paths, parts), key=lambda file: PARTS.index(file[1]))
