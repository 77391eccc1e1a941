"""Histories under the data protocol: the users that count, training interactions, targets, item popularity.

The protocol (IISAN, section 4.1): users with fewer than 5 interactions are dropped; each history is cut to its last
13 before items are counted; leave-one-out, with at most 10 inputs. Beside it a temporal split, which needs times, and
one that the dataset gives. Items are numbered from 1; 0 is padding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ProtocolConfig
from ..errors import InputError, check_choice
from ..files import as_path
from ..setting_fields import from_dict
from .array_files import pack_texts, write_arrays
from .given_split import given_split, read_parts, report_unread
from .histories import read_histories
from .items import read_items
from .split import Split, distinct_targets
from .temporal import SplitHistories, temporal_split

LEAVE_ONE_OUT = {"validation": 2, "test": 1}  # how far from a history's end the target stands


@dataclass(frozen=True)
class Sequences:
    """Users' histories, oldest first, as one jagged array of item numbers.

    Without `training_ends` and `targets` they are split by leave-one-out.
    """

    user_ids: list[str]
    item_ids: list[str]  # item number i is item_ids[i - 1]
    offsets: np.ndarray  # int64 [users + 1]: user u holds items[offsets[u]:offsets[u + 1]]
    items: np.ndarray  # int64 [interactions], each from 1 to len(item_ids)
    max_inputs: int
    training_ends: np.ndarray | None = None  # int64 [users]: user u trains on items[offsets[u]:training_ends[u]]
    targets: Mapping[str, np.ndarray] | None = (
        None  # int64 [users] by split: the first target's index in items, -1 for none
    )
    target_counts: Mapping[str, np.ndarray] | None = None  # int64 [users] by split: of targets, which lie side by side
    without_history: Mapping[str, int] | None = None  # targets by split that are left out: nothing comes before them

    def __post_init__(self) -> None:
        """Split by leave-one-out if no split was passed."""
        if self.targets is None:
            targets = {name: self.offsets[1:] - back for name, back in LEAVE_ONE_OUT.items()}
            object.__setattr__(self, "targets", targets)
            object.__setattr__(self, "training_ends", targets["validation"])
        if self.target_counts is None:
            counts = {name: (first >= 0).astype(np.int64) for name, first in self.targets.items()}
            object.__setattr__(self, "target_counts", counts)
        if self.without_history is None:
            object.__setattr__(self, "without_history", dict.fromkeys(LEAVE_ONE_OUT, 0))

    @cached_property
    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (offsets, int64 [users + 1], items) of all histories, each cut where its training ends."""
        lengths = self.training_ends - self.offsets[:-1]
        in_training = np.arange(len(self.items)) < np.repeat(self.training_ends, np.diff(self.offsets))
        return np.concatenate([[0], np.cumsum(lengths)]), self.items[in_training]

    @cached_property
    def training_users(self) -> np.ndarray:
        """Return the users with at least two training interactions, int64; by leave-one-out these are all."""
        return np.flatnonzero(np.diff(self.training[0]) >= 2)

    @cached_property
    def epoch_interactions(self) -> int:
        """Return the number of interactions in an epoch, those of the training users."""
        return int(np.diff(self.training[0])[self.training_users].sum())

    @cached_property
    def training_counts(self) -> np.ndarray:
        """Return how often each item number occurs in training, int64 [items + 1]."""
        return np.bincount(self.training[1], minlength=len(self.item_ids) + 1)

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
        counts = self.target_counts[name][users]
        if counts.max(initial=0) > 1:
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
            "items": self.items.astype(np.int32),
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
    table = read_items(root, protocol.unescape_titles)
    whole = _read_sequences(root, table.ids, protocol)
    catalogue = np.flatnonzero(np.bincount(whole.items))
    number = np.zeros(len(table.ids) + 1, dtype=np.int64)
    number[catalogue] = np.arange(1, len(catalogue) + 1)
    item_ids = [table.ids[item - 1] for item in catalogue]
    titles = [table.titles[item - 1] for item in catalogue]
    captions = table.captions or {}
    stand_ins = titles if captions and protocol.missing_captions == "title" else [None] * len(titles)
    return Dataset(
        root=root,
        titles=titles,
        captions=[captions.get(item_id, stand_in) for item_id, stand_in in zip(item_ids, stand_ins)],
        protocol=protocol,
        sequences=replace(whole, item_ids=item_ids, items=number[whole.items]),
    )


def statistics(sequences: Sequences) -> dict[str, int | float]:
    """Return the counts of users, items, interactions and targets, and the shares of cold targets and padding."""
    slots = len(sequences.training_users) * (sequences.max_inputs + 1)
    splits = {name: sequences.split(name) for name in LEAVE_ONE_OUT}
    test = splits["test"]
    left_out = sum(sequences.without_history.values())
    return {
        "users": len(sequences.user_ids),
        "items": len(sequences.item_ids),
        "interactions": len(sequences.items),
        "training_interactions": len(sequences.training[1]),
        "training_users": len(sequences.training_users),
        **{f"{name}_targets": len(split.targets) for name, split in splits.items()},
        **{
            f"{name}_users": len(split.first_rows) for name, split in splits.items() if split.repeated_users is not None
        },
        **({"targets_without_history": left_out} if left_out else {}),
        "cold_targets_share": float((sequences.training_counts[test.targets] == 0).mean()),
        "unreachable_targets_share": float((~test.reachable).mean()),
        "padding_share": 1 - sequences.epoch_interactions / slots,
        "interactions_per_user": len(sequences.items) / len(sequences.user_ids),
        "interactions_per_item": len(sequences.items) / len(sequences.item_ids),
    }


def _read_sequences(root: Path, item_ids: list[str], protocol: ProtocolConfig) -> Sequences:
    """Return the histories that the protocol keeps, in the numbers of `item_ids`. Raises InputError."""
    if protocol.split == "given":
        return _read_given_sequences(root, item_ids, protocol)
    report_unread(root / "splits.tsv", protocol.split)
    temporal = protocol.split == "temporal"
    histories = read_histories(root, item_ids, timed=temporal)
    lengths = np.diff(histories.offsets)
    users = np.flatnonzero(lengths >= protocol.min_interactions)
    if not len(users):
        least = protocol.min_interactions
        raise InputError(f"{root / 'users.tsv'}: none of {len(lengths)} users has the {least} interactions that count")
    user_ids = [histories.user_ids[user] for user in users]
    lengths = lengths[users] if temporal else np.minimum(lengths[users], protocol.max_history)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    last_interactions = np.arange(offsets[-1]) + np.repeat(histories.offsets[users + 1] - offsets[1:], lengths)
    items = histories.items[last_interactions]
    if not temporal:
        return Sequences(user_ids, item_ids, offsets, items, protocol.max_inputs)
    split = temporal_split(offsets, histories.times[last_interactions], protocol)
    return _sequences_of(split, user_ids, item_ids, items, protocol.max_inputs)


def _read_given_sequences(root: Path, item_ids: list[str], protocol: ProtocolConfig) -> Sequences:
    """Return the histories as splits.tsv divides them, in the numbers of `item_ids`. Raises InputError."""
    path = root / "splits.tsv"
    histories = read_histories(root, item_ids, timed=False)
    parts = read_parts(path, histories.user_ids, np.diff(histories.offsets))
    split = given_split(histories.offsets, parts, protocol.max_inputs, path)
    sequences = _sequences_of(split, histories.user_ids, item_ids, histories.items, protocol.max_inputs)
    return replace(sequences, target_counts=split.target_counts, without_history=split.without_history)


def _sequences_of(
    split: SplitHistories, user_ids: list[str], item_ids: list[str], items: np.ndarray, max_inputs: int
) -> Sequences:
    """Return the part of all users' histories that a split keeps. items: int64, of all histories."""
    return Sequences(
        user_ids=[user_ids[user] for user in split.users],
        item_ids=item_ids,
        offsets=split.offsets,
        items=items[split.interactions],
        max_inputs=max_inputs,
        training_ends=split.training_ends,
        targets=split.targets,
    )
