"""Name the folders of runs without a name of their own: runs/NAME-1, runs/NAME-2 and so on."""

from __future__ import annotations

import os
from pathlib import Path


def free_folder(name: str) -> Path:
    """Return the first runs/NAME-N, counted from 1, that does not exist."""
    number = 1
    while os.path.lexists(folder := Path("runs") / f"{name}-{number}"):
        number += 1
    return folder


def make_free_folder(name: str) -> Path:
    """Make the first folder runs/NAME-N that no other process takes, and return it."""
    while True:
        path = free_folder(name)
        path.parent.mkdir(exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:  # another process was faster
            continue
        return path
