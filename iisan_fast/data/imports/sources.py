"""Find the files of a source in its folder."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError, first_few


def find(folder: Path, *patterns: str) -> Path | None:
    """Return the file that matches the first pattern with a match. Raises InputError if several files match it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    for pattern in patterns:
        matches = sorted(folder.glob(pattern))
        if len(matches) > 1:
            names = first_few((match.name for match in matches), len(matches))
            raise InputError(f"{folder}: expected one {pattern}, found {names}; give each dataset a folder of its own")
        if matches:
            return matches[0]
    return None
