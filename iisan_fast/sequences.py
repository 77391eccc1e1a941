"""Histories under the data protocol: who counts, what is trained on, what is predicted, how popular items are.

The protocol (IISAN, section 4.1): users with fewer than 5 interactions are dropped; each history is cut to its last
13 before items are counted; leave-one-out, with at most 10 inputs. Items are numbered from 1; 0 is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from .config import ProtocolConfig
from .errors import InputError
from .items import ItemTable, read_items, read_table

HELD_OUT = {"validation": 2, "test": 1}  # how far from a history's end the target stands


@dataclass(frozen=True)
class Sequences:
    """Users' histories, oldest first, as one jagged array of item numbers."""

    user_ids: list[str]
    item_ids: list[str]  # item number i is item_ids[i - 1]
    offsets: np.ndarray  # int64 [users + 1]: user u holds items[offsets[u]:offsets[u + 1]]
    items: np.ndarray  # int64 [interactions], each from 1 to len(item_ids)
    max_inputs: int

    @cached_property
    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """(offsets [users + 1], items): every history without its last two interactions."""
        lengths = np.diff(self.offsets) - 2
        position = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], lengths + 2)
        kept = position < np.repeat(lengths, lengths + 2)
        return np.concatenate([[0], np.cumsum(lengths)]), self.items[kept]

    @cached_property
    def training_counts(self) -> np.ndarray:
        """int64 [items + 1]: how often each item number occurs in training."""
        return np.bincount(self.training[1], minlength=len(self.item_ids) + 1)

    @property
    def popularity(self) -> np.ndarray:
        """float64 [items + 1]: p(i), the share of item i among training interactions."""
        return self.training_counts / self.training_counts.sum()

    def split(self, name: str) -> Split:
        """The `validation` or `test` task of every user."""
        ends = self.offsets[1:] - HELD_OUT[name]
        lengths = ends - self.offsets[:-1]
        history = _right_align(self.items, ends, lengths, self.max_inputs + 2)
        return Split(history[:, -self.max_inputs :], history, self.items[ends])

    def save(self, path: Path) -> None:
        """Writes one .npz file that `load_sequences` reads back."""
        np.savez_compressed(
            path,
            user_ids=np.array(self.user_ids, dtype=np.str_),
            item_ids=np.array(self.item_ids, dtype=np.str_),
            offsets=self.offsets,
            items=self.items.astype(np.int32),
            max_inputs=np.int64(self.max_inputs),
        )


@dataclass(frozen=True)
class Split:
    """One held-out interaction a user. Arrays are int64, right-aligned, 0 where there is nothing."""

    inputs: np.ndarray  # [users, max_inputs]: what the sequence encoder reads
    history: np.ndarray  # [users, max_inputs + 2]: everything before the target, what ranking may mask
    targets: np.ndarray  # [users]

    @property
    def reachable(self) -> np.ndarray:
        """bool [users]: the target does not stand in the user's own history."""
        return ~(self.history == self.targets[:, None]).any(axis=1)


@dataclass(frozen=True)
class Dataset:
    """A dataset folder after the protocol: the catalogue's contents, in the numbering of its sequences."""

    root: Path
    titles: list[str]
    captions: list[str | None]  # None where captions.tsv has no line for the item
    unescaped: bool  # HTML entities in titles and captions
    sequences: Sequences


def load_dataset(root: Path, protocol: ProtocolConfig = ProtocolConfig()) -> Dataset:
    """Reads `items.tsv`, `users.tsv` and, where there is one, `captions.tsv`, and applies the protocol.

    Raises InputError for a missing or malformed file, naming file and line.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected a dataset with items.tsv and users.tsv")
    table = read_items(root, protocol.unescape_titles)
    user_ids, histories = _read_histories(root / "users.tsv", table, protocol)
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])])
    rows = np.concatenate(histories)
    catalogue = np.unique(rows)
    number = np.zeros(len(table.ids), dtype=np.int64)
    number[catalogue] = np.arange(1, len(catalogue) + 1)
    item_ids = [table.ids[row] for row in catalogue]
    captions = table.captions or {}
    return Dataset(
        root=root,
        titles=[table.titles[row] for row in catalogue],
        captions=[captions.get(item_id) for item_id in item_ids],
        unescaped=protocol.unescape_titles,
        sequences=Sequences(user_ids, item_ids, offsets, number[rows], protocol.max_inputs),
    )


def load_sequences(path: Path) -> Sequences:
    """Reads what `Sequences.save` wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Sequences(
                user_ids=file["user_ids"].tolist(),
                item_ids=file["item_ids"].tolist(),
                offsets=file["offsets"],
                items=file["items"].astype(np.int64),
                max_inputs=int(file["max_inputs"]),
            )
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (BadZipFile, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path}: not the histories of a run, or damaged ({error})") from None


def statistics(sequences: Sequences) -> dict[str, int | float]:
    """The protocol's counts, and the shares that decide how hard and how wasteful training is."""
    lengths = np.diff(sequences.training[0])
    test = sequences.split("test")
    return {
        "users": len(sequences.user_ids),
        "items": len(sequences.item_ids),
        "interactions": len(sequences.items),
        "training_interactions": int(lengths.sum()),
        "cold_targets_share": float((sequences.training_counts[test.targets] == 0).mean()),
        "unreachable_targets_share": float((~test.reachable).mean()),
        "padding_share": float(1 - lengths.sum() / (len(lengths) * (sequences.max_inputs + 1))),
        "interactions_per_user": len(sequences.items) / len(sequences.user_ids),
        "interactions_per_item": len(sequences.items) / len(sequences.item_ids),
    }


def _read_histories(path: Path, table: ItemTable, protocol: ProtocolConfig) -> tuple[list[str], list[np.ndarray]]:
    rows = {item_id: row for row, item_id in enumerate(table.ids)}
    lines: dict[str, int] = {}
    user_ids: list[str] = []
    histories: list[np.ndarray] = []
    for line, (user_id, history) in read_table(path, 2):
        if user_id in lines:
            raise InputError(f"{path} line {line}: user {user_id!r} stands on line {lines[user_id]} already")
        lines[user_id] = line
        try:
            items = [rows[item_id] for item_id in history.split(" ")]
        except KeyError as error:
            item_id = error.args[0]
            what = f"item {item_id!r} is not in items.tsv" if item_id else "an empty item id (two spaces?)"
            raise InputError(f"{path} line {line}: {what}") from None
        if len(items) >= protocol.min_interactions:
            user_ids.append(user_id)
            histories.append(np.array(items[-protocol.max_history :], dtype=np.int64))
    if not histories:
        raise InputError(
            f"{path}: none of {len(lines)} users has the {protocol.min_interactions} interactions that count"
        )
    return user_ids, histories


def _right_align(items: np.ndarray, ends: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """[len(ends), width]: the last `width` of the `lengths` items before each end, 0 on the left."""
    back = np.arange(width, 0, -1)
    index = ends[:, None] - back
    return np.where(back <= lengths[:, None], items[np.maximum(index, 0)], 0)
