"""Add a further user to training for each user: one with the same training history in reverse order."""

from __future__ import annotations

import numpy as np

from .jagged_arrays import places, row_blocks
from .sequences import LEAVE_ONE_OUT, Sequences


def with_reversed_users(sequences: Sequences) -> Sequences:
    """Return histories to train on: those of all users, cut where their training ends, and then each one reversed.

    The reversed history of user u is that of user u + users, and has the same user id. No user has a target of
    validation or test: those, the popularity and the history masks are taken from `sequences`, which do not change.
    """
    lengths = sequences.training_lengths
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    count = int(offsets[-1])
    items = np.empty(2 * count, dtype=sequences.items.dtype)
    for first, end in row_blocks(lengths):
        starts = sequences.offsets[first:end]
        here = places(starts, lengths[first:end])
        block = slice(offsets[first], offsets[end])
        items[block] = sequences.items[here]
        backwards = np.repeat(2 * starts + lengths[first:end] - 1, lengths[first:end]) - here
        items[count:][block] = sequences.items[backwards]
    all_offsets = np.concatenate([offsets, offsets[1:] + count])
    no_targets = np.full(2 * len(lengths), -1)
    return Sequences(
        user_ids=2 * sequences.user_ids,  # type: ignore[operator]  # a list, or a TextArray
        item_ids=sequences.item_ids,
        offsets=all_offsets,
        items=items,
        max_inputs=sequences.max_inputs,
        training_ends=all_offsets[1:],
        targets=dict.fromkeys(LEAVE_ONE_OUT, no_targets),
    )
