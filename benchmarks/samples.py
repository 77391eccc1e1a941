"""A dataset of fewer users, for what takes long with all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..config import ProtocolConfig
from ..data import read_table
from ..errors import InputError
from ..files import whole_folder


def sample_users(dataset: Path, folder: Path, count: int, seed: int = 0) -> Path:
    """A dataset folder with so many users of another one, drawn at random among those whom the protocol keeps.

    What lies beside the histories is linked, not copied; their times are left out. A folder that exists already is
    taken as it is.
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
    """Users and histories that the protocol keeps. Raises InputError where they are fewer than `count`."""
    least = ProtocolConfig().min_interactions
    lines = [(user, history) for _, (user, history) in read_table(dataset / "users.tsv", 2)]
    kept = [(user, history) for user, history in lines if history.count(" ") + 1 >= least]
    if not 1 <= count <= len(kept):
        raise InputError(f"users: expected 1 to {len(kept)}, those of {dataset} whom the protocol keeps, found {count}")
    return kept
