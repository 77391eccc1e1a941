"""Add a further user to training for each user: one with the same training history in reverse order."""

from __future__ import annotations

import numpy as np

from .sequences import LEAVE_ONE_OUT, Sequences


def with_reversed_users(sequences: Sequences) -> Sequences:
    """Return histories to train on: those of all users, cut where their training ends, and then each one reversed.

    The reversed history of user u is that of user u + users, and has the same user id. No user has a target of
    validation or test: those, the popularity and the history masks are taken from `sequences`, which do not change.
    """
    offsets, items = sequences.training
    lengths = np.diff(offsets)
    users = np.repeat(np.arange(len(lengths)), lengths)
    reversed_items = items[(offsets[:-1] + offsets[1:] - 1)[users] - np.arange(len(items))]
    all_offsets = np.concatenate([offsets, offsets[1:] + len(items)])
    no_targets = np.full(2 * len(lengths), -1)
    return Sequences(
        user_ids=2 * sequences.user_ids,
        item_ids=sequences.item_ids,
        offsets=all_offsets,
        items=np.concatenate([items, reversed_items]),
        max_inputs=sequences.max_inputs,
        training_ends=all_offsets[1:],
        targets=dict.fromkeys(LEAVE_ONE_OUT, no_targets),
    )
