"""Parse a dataset folder under the protocol, some users at a time, so that all interactions are never copied in memory.

The protocol (IISAN, section 4.1): users with fewer than 5 interactions are dropped; each history is cut to its last
13 before items are counted; leave-one-out, with at most 10 inputs. Beside it a temporal split, which needs times, and
one that the dataset gives. Items are numbered from 1; 0 is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import ProtocolConfig
from ..errors import InputError
from .given_split import given_split, read_parts
from .growing_arrays import GrowingArrays
from .histories import Histories, read_histories
from .items import read_items
from .jagged_arrays import places, row_blocks
from .split import leave_one_out
from .temporal import SplitHistories, temporal_split


class ParsedDataset(NamedTuple):
    """A dataset folder under the protocol. Title and caption i - 1 belong to item number i."""

    user_ids: Sequence[str]
    item_ids: list[str]  # of items that occur in histories, in the order of items.tsv
    titles: list[str]
    captions: list[str | None]
    offsets: np.ndarray  # int64 [users + 1]
    items: np.ndarray  # int64 or int32 [interactions]: item numbers
    training_ends: np.ndarray  # int64 [users]
    targets: Mapping[str, np.ndarray]  # int64 [users] by split
    target_counts: Mapping[str, np.ndarray] | None  # int64 [users] by split; None: one for each target
    without_history: Mapping[str, int] | None  # targets by split; None: not known


def parse_dataset(root: Path, protocol: ProtocolConfig, scratch: GrowingArrays, result: GrowingArrays) -> ParsedDataset:
    """Read a dataset folder and apply the protocol.

    scratch, result: take the arrays that are needed for a while, and those of the result. Raises InputError for a
    missing or malformed file, naming file and line, and OSError if there is no room for the arrays.
    """
    table = read_items(root, protocol.unescape_titles)
    histories, split = _kept_histories(root, table.ids, protocol, scratch)
    counts = np.zeros(len(table.ids) + 1, dtype=np.int64)
    for block in _kept_items(histories.items, split):
        counts += np.bincount(block, minlength=len(counts))
    catalogue = np.flatnonzero(counts)
    number = np.zeros(len(counts), dtype=result.item_dtype)
    number[catalogue] = np.arange(1, len(catalogue) + 1)
    items = result.array("items", result.item_dtype)
    for block in _kept_items(histories.items, split):
        items.append(number[block])
    user_ids = result.texts("user_ids")
    user_ids.extend_by(histories.user_ids, split.users)
    item_ids = [table.ids[item - 1] for item in catalogue]
    titles = [table.titles[item - 1] for item in catalogue]
    captions = table.captions or {}
    stand_ins = titles if captions and protocol.missing_captions == "title" else [None] * len(titles)
    return ParsedDataset(
        user_ids=user_ids.finish(),
        item_ids=item_ids,
        titles=titles,
        captions=[captions.get(item_id, stand_in) for item_id, stand_in in zip(item_ids, stand_ins)],
        offsets=split.offsets,
        items=items.finish(),
        training_ends=split.training_ends,
        targets=split.targets,
        target_counts=split.target_counts,
        without_history=split.without_history,
    )


def _kept_histories(
    root: Path, item_ids: list[str], protocol: ProtocolConfig, scratch: GrowingArrays
) -> tuple[Histories, SplitHistories]:
    """Return all histories, in the numbers of `item_ids`, and the part of them that the protocol keeps.

    Raises InputError, and OSError if there is no room.
    """
    histories = read_histories(root, item_ids, protocol.split == "temporal", scratch)
    if protocol.split == "given":
        path = root / "splits.tsv"
        parts = read_parts(path, histories.user_ids, np.diff(histories.offsets))
        return histories, given_split(histories.offsets, parts, protocol.max_inputs, path)
    lengths = np.diff(histories.offsets)
    users = np.flatnonzero(lengths >= protocol.min_interactions)
    if not len(users):
        least = protocol.min_interactions
        raise InputError(f"{root / 'users.tsv'}: none of {len(lengths)} users has the {least} interactions that count")
    if protocol.split == "temporal":
        return histories, _temporal(histories, users, protocol, scratch)
    lengths = np.minimum(lengths[users], protocol.max_history)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts = histories.offsets[users + 1] - lengths
    targets = leave_one_out(offsets)
    return histories, SplitHistories(users, starts, offsets, targets["validation"], targets)


def _temporal(
    histories: Histories, users: np.ndarray, protocol: ProtocolConfig, scratch: GrowingArrays
) -> SplitHistories:
    """Return the part that a temporal split of some users' histories keeps. users: int64, of all users.

    Raises InputError, and OSError if there is no room.
    """
    starts = histories.offsets[users]
    lengths = histories.offsets[users + 1] - starts
    times = scratch.array("times_of_users", np.int64)
    for first, end in row_blocks(lengths):
        times.append(histories.times[places(starts[first:end], lengths[first:end])])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    split = temporal_split(offsets, times.finish(), protocol)
    moved = starts - offsets[:-1]
    return split._replace(users=users[split.users], starts=split.starts + moved[split.users])


def _kept_items(items: np.ndarray, split: SplitHistories) -> Iterator[np.ndarray]:
    """Yield the items of the kept histories, some users' at a time. items: of all histories."""
    lengths = np.diff(split.offsets)
    for first, end in row_blocks(lengths):
        yield items[places(split.starts[first:end], lengths[first:end])]
