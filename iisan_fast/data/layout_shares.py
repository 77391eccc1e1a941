"""Share out the users of laid-out batches among the ranks of a job."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..ranks import Ranks
from .epoch_plan import Layout


def layout_share(layout: Layout, ranks: Ranks) -> Layout:
    """Return this rank's share of each batch: the users that `Batch.share` takes, with the distinct items of all.

    Unlike `Batch.share`, a rank may have no user of a batch. An item that the rank's users do not have is distinct all
    the same, without slots.
    """
    if not ranks.several:
        return layout
    counts = np.diff(layout.user_bounds)
    firsts, ends = (counts * rank // ranks.count for rank in (ranks.rank, ranks.rank + 1))
    in_batch = np.arange(len(layout.users)) - layout.by_batch(layout.user_bounds[:-1], layout.user_bounds)
    bounds = layout.user_bounds
    user_taken = (layout.by_batch(firsts, bounds) <= in_batch) & (in_batch < layout.by_batch(ends, bounds))
    slot_taken = user_taken[layout.slot_user]
    row_taken = user_taken[layout.row_user]
    sorted_taken = slot_taken[layout.sorted_slots]
    user_bounds = _starts(ends - firsts)
    user_slots = _starts(np.diff(layout.user_slots, append=len(layout.slot_user))[user_taken])
    user_rows = _starts(np.diff(layout.user_rows)[user_taken])
    new_users, new_slots = np.cumsum(user_taken) - 1, np.cumsum(slot_taken) - 1
    return replace(
        layout,
        users=layout.users[user_taken],
        user_bounds=user_bounds,
        slot_bounds=user_slots[user_bounds],
        row_bounds=user_rows[user_bounds],
        user_slots=user_slots[:-1],
        user_rows=user_rows,
        row_user=new_users[layout.row_user[row_taken]],
        row_slot=new_slots[layout.row_slot[row_taken]],
        slot_user=new_users[layout.slot_user[slot_taken]],
        slot_distinct=layout.slot_distinct[slot_taken],
        sorted_slots=new_slots[layout.sorted_slots[sorted_taken]],
        occurrences=_starts(sorted_taken)[layout.occurrences],
    )


def _starts(counts: np.ndarray) -> np.ndarray:
    """Return the start of each run of `counts` elements, then the end of the last."""
    return np.concatenate([[0], np.cumsum(counts)])
