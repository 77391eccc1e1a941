"""Histories under the data protocol: the users that count, training interactions, targets, item popularity."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ProtocolConfig
from ..errors import InputError, check_choice
from ..files import as_path
from ..setting_fields import from_dict
from .array_files import pack_texts, write_arrays
from .given_split import report_left_out, report_unread
from .jagged_arrays import places, row_blocks
from .parsed_cache import parsed_dataset
from .split import LEAVE_ONE_OUT, Split, distinct_targets, leave_one_out


@dataclass(frozen=True)
class Sequences:
    """Users' histories, oldest first, as one jagged array of item numbers.

    Without `training_ends` and `targets` they are split by leave-one-out.
    """

    user_ids: Sequence[str]
    item_ids: list[str]  # item number i is item_ids[i - 1]
    offsets: np.ndarray  # int64 [users + 1]: user u holds items[offsets[u]:offsets[u + 1]]
    items: np.ndarray  # int64 or int32 [interactions], which may lie in a file; each from 1 to len(item_ids)
    max_inputs: int
    training_ends: np.ndarray | None = None  # int64 [users]: user u trains on items[offsets[u]:training_ends[u]]
    targets: Mapping[str, np.ndarray] | None = (
        None  # int64 [users] by split: the first target's index in items, -1 for none
    )
    target_counts: Mapping[str, np.ndarray] | None = None  # integers [users] by split: of targets, side by side
    without_history: Mapping[str, int] | None = None  # targets by split that are left out: nothing comes before them

    def __post_init__(self) -> None:
        """Split by leave-one-out if no split was passed."""
        if self.targets is None:
            targets = leave_one_out(self.offsets)
            object.__setattr__(self, "targets", targets)
            object.__setattr__(self, "training_ends", targets["validation"])
        if self.target_counts is None:
            counts = {name: (first >= 0).view(np.int8) for name, first in self.targets.items()}
            object.__setattr__(self, "target_counts", counts)
        if self.without_history is None:
            object.__setattr__(self, "without_history", dict.fromkeys(LEAVE_ONE_OUT, 0))

    @cached_property
    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (offsets, int64 [users + 1], items) of all histories, each cut where its training ends.

        They are copies. User u's items are also items[offsets[u]:training_ends[u]] of these sequences.
        """
        offsets = np.concatenate([[0], np.cumsum(self.training_lengths)])
        return offsets, self.items[places(self.offsets[:-1], self.training_lengths)]

    @cached_property
    def training_lengths(self) -> np.ndarray:
        """Return the number of each user's training interactions, int64 [users]."""
        return self.training_ends - self.offsets[:-1]

    @cached_property
    def training_users(self) -> np.ndarray:
        """Return the users with at least two training interactions, int64; by leave-one-out these are all."""
        return np.flatnonzero(self.training_lengths >= 2)

    @cached_property
    def epoch_interactions(self) -> int:
        """Return the number of interactions in an epoch, those of the training users."""
        return int(self.training_lengths.sum(where=self.training_lengths >= 2))

    @cached_property
    def training_counts(self) -> np.ndarray:
        """Return how often each item number occurs in training, int64 [items + 1]."""
        counts = np.zeros(len(self.item_ids) + 1, dtype=np.int64)
        for first, end in row_blocks(self.training_lengths):
            here = places(self.offsets[first:end], self.training_lengths[first:end])
            counts += np.bincount(self.items[here], minlength=len(counts))
        return counts

    @property
    def popularity(self) -> np.ndarray:
        """Return p(i), the share of item i among training interactions, float64 [items + 1].

        Element 0, the padding, is 0.
        """
        return self.training_counts / self.training_counts.sum()

    def split(self, name: str) -> Split:
        """Return the `validation` or `test` targets and their histories. Raises InputError for another name.

        An item that stands twice among a user's targets is one target.
        """
        check_choice("split", name, LEAVE_ONE_OUT)
        users = np.flatnonzero(self.targets[name] >= 0)
        ends = self.targets[name][users]
        targets = self.items[ends]
        if self.target_counts[name].max(initial=0) > 1:
            counts = self.target_counts[name][users]
            rows, targets = distinct_targets(self.items, ends, counts)
            users, ends = users[rows], ends[rows]
        lengths = ends - self.offsets[users]
        return Split(
            users=users,
            targets=targets.astype(np.int64, copy=False),
            lengths=lengths,
            ends=ends,
            items=self.items,
            max_inputs=self.max_inputs,
        )

    def save(self, path: Path) -> None:
        """Write one .npz file, with checksums, which `load_sequences` reads."""
        user_ids, user_id_ends = pack_texts(self.user_ids)
        item_ids, item_id_ends = pack_texts(self.item_ids)
        arrays = {
            "user_ids": user_ids,
            "user_id_ends": user_id_ends,
            "item_ids": item_ids,
            "item_id_ends": item_id_ends,
            "offsets": self.offsets,
            "items": self.items.astype(np.int32, copy=False),
            "max_inputs": np.int64(self.max_inputs),
            "training_ends": self.training_ends,
        }
        arrays |= {f"{name}_targets": self.targets[name] for name in LEAVE_ONE_OUT}
        if any(counts.max(initial=0) > 1 for counts in self.target_counts.values()):
            arrays |= {f"{name}_target_counts": self.target_counts[name] for name in LEAVE_ONE_OUT}
        if any(self.without_history.values()):
            arrays |= {f"{name}_without_history": np.int64(self.without_history[name]) for name in LEAVE_ONE_OUT}
        write_arrays(path, arrays)


@dataclass(frozen=True)
class Dataset:
    """A dataset folder after the protocol. Title and caption i - 1 belong to item number i of the sequences."""

    root: Path
    titles: list[str]
    captions: list[str | None]  # None if captions.tsv has no line for the item and the protocol takes no title instead
    protocol: ProtocolConfig
    sequences: Sequences

    @classmethod
    def from_frames(
        cls,
        interactions: object,
        items: object,
        images: str | os.PathLike[str] | None = None,
        captions: object = None,
        folder: str | os.PathLike[str] | None = None,
        protocol: ProtocolConfig | None = None,
        **settings: Any,
    ) -> Dataset:
        """Write a dataset folder from frames, and return the dataset under the protocol.

        interactions: a frame of pandas, polars or arrow, or a list of dicts, with user_id, item_id and, if there are
            times, timestamp: whole numbers or points in time. A user's interactions are sorted by timestamp; equal
            ones, or all without timestamps, keep their order.
        items: the same with item_id, title and, if there are captions, caption. Items without interactions are left
            out, with a warning.
        images: a folder of images named by item id, or an LMDB of images; the dataset gets a link to it.
        captions: a frame with item_id and caption, if items has no column caption.
        folder: where the dataset is written, which must not exist yet; by default in the user's cache folder. Equal
            frames give the same folder there, which is then not written again.
        settings: those of ProtocolConfig, as min_interactions=5; they change `protocol`.

        Raises InputError for frames that cannot be used, naming the row or the first few ids, and if polars is missing.
        """
        from .imports.writing.dataset_frames import write_frames  # needs polars, which not every installation has

        changed = from_dict(ProtocolConfig, {**vars(protocol or ProtocolConfig()), **settings})
        root = write_frames(
            interactions,
            items,
            None if images is None else as_path("images", images),
            captions,
            None if folder is None else as_path("folder", folder),
        )
        return load_dataset(root, changed)

    def texts(self, source: str) -> list[str | None]:
        """Return the titles if `source` is "title", else the captions."""
        return self.titles if source == "title" else self.captions

    def how_read(self, source: str) -> dict[str, Any]:
        """Describe how the texts of a view were read, for the view's description."""
        settings: dict[str, Any] = {"unescaped": self.protocol.unescape_titles}
        if source == "caption" and self.protocol.missing_captions != "error":
            settings["missing_captions"] = self.protocol.missing_captions
        return settings


def load_dataset(root: Path, protocol: ProtocolConfig = ProtocolConfig()) -> Dataset:
    """Read a dataset folder and apply the protocol.

    items.tsv and users.tsv are read, captions.tsv if it is there, times.tsv for a temporal split, and splits.tsv for a
    given one. Raises InputError for a missing or malformed file, naming file and line.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected a dataset with items.tsv and users.tsv")
    report_unread(root / "splits.tsv", protocol.split)
    parsed = parsed_dataset(root, protocol)
    report_left_out(root / "splits.tsv", parsed.without_history)
    return Dataset(
        root=root,
        titles=parsed.titles,
        captions=parsed.captions,
        protocol=protocol,
        sequences=Sequences(
            user_ids=parsed.user_ids,
            item_ids=parsed.item_ids,
            offsets=parsed.offsets,
            items=parsed.items,
            max_inputs=protocol.max_inputs,
            training_ends=parsed.training_ends,
            targets=parsed.targets,
            target_counts=parsed.target_counts,
            without_history=parsed.without_history,
        ),
    )


def statistics(sequences: Sequences) -> dict[str, int | float]:
    """Return the counts of users, items, interactions and targets, and the shares of cold targets and padding."""
    slots = len(sequences.training_users) * (sequences.max_inputs + 1)
    targets: dict[str, int] = {}
    users: dict[str, int] = {}
    for name in LEAVE_ONE_OUT:  # one after the other: each takes hundreds of bytes a user
        split = sequences.split(name)
        targets[f"{name}_targets"] = len(split.targets)
        if split.repeated_users is not None:
            users[f"{name}_users"] = len(split.first_rows)
    left_out = sum(sequences.without_history.values())
    return {
        "users": len(sequences.user_ids),
        "items": len(sequences.item_ids),
        "interactions": len(sequences.items),
        "training_interactions": int(sequences.training_lengths.sum()),
        "training_users": len(sequences.training_users),
        **targets,
        **users,
        **({"targets_without_history": left_out} if left_out else {}),
        "cold_targets_share": float((sequences.training_counts[split.targets] == 0).mean()),
        "unreachable_targets_share": float((~split.reachable).mean()),
        "padding_share": 1 - sequences.epoch_interactions / slots,
        "interactions_per_user": len(sequences.items) / len(sequences.user_ids),
        "interactions_per_item": len(sequences.items) / len(sequences.item_ids),
    }
