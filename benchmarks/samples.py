"""Draw a sample of a dataset's users."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..config import ProtocolConfig
from ..data import read_table
from ..errors import InputError
from ..files import whole_folder


def sample_users(dataset: Path, folder: Path, count: int, seed: int = 0) -> Path:
    """Write a dataset folder with that many users of another one, drawn from those that the protocol keeps.

    Other files are linked, not copied; times are left out. A folder that exists is returned as it is.
    """
    if folder.exists():
        return folder
    lines = users_to_draw_from(dataset, count)
    drawn = np.sort(np.random.default_rng(seed).choice(len(lines), count, replace=False))
    with whole_folder(folder) as new:
        for other in dataset.iterdir():
            if other.name not in ("users.tsv", "times.tsv"):
                (new / other.name).symlink_to(other.resolve())
        text = "".join(f"{lines[index][0]}\t{lines[index][1]}\n" for index in drawn)
        (new / "users.tsv").write_text(text, encoding="utf-8", newline="\n")
    return folder


def users_to_draw_from(dataset: Path, count: int) -> list[tuple[str, str]]:
    """Return the users and histories that the protocol keeps. Raises InputError if they are fewer than `count`."""
    least = ProtocolConfig().min_interactions
    lines = [(user, history) for _, (user, history) in read_table(dataset / "users.tsv", 2)]
    protocol_users = [(user, history) for user, history in lines if history.count(" ") + 1 >= least]
    most = len(protocol_users)
    if not 1 <= count <= most:
        raise InputError(f"users: expected 1 to {most}, those of {dataset} whom the protocol keeps, found {count}")
    return protocol_users
