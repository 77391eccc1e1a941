"""Refuse a folder that the machines of a job do not share, before hours of work end in a file that one of them has."""

from __future__ import annotations

import uuid
from pathlib import Path

from ..errors import InputError
from .ranks import Ranks


def refuse_unshared(ranks: Ranks, folder: Path) -> None:
    """Raise InputError on all ranks if one of them does not see a file that rank 0 writes into a folder.

    Every rank calls it, once the folder is there. Ranks of one machine share its folders.
    """
    if ranks.on_this_machine == ranks.count:
        return
    mark = folder / ranks.from_first(f".seen-{uuid.uuid4().hex}")  # a new name: no file system answers from memory
    ranks.first_does(mark.touch)
    try:
        ranks.all_do(lambda: _refuse_missing(mark))
    finally:
        if ranks.is_first:
            mark.unlink(missing_ok=True)


def _refuse_missing(mark: Path) -> None:
    """Raise InputError if this rank does not see a file."""
    if not mark.exists():
        raise InputError(
            f"{mark.parent.absolute()}: the files that rank 0 writes there are not seen; choose a folder that all "
            "machines share, and start all ranks in one working folder"
        )
