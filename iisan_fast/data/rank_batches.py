"""Training batches for negatives of a rank's own users: each rank has a batch of its users alone.

This is the loss of DistributedDataParallel, as the released code of IISAN trained with it: a rank's loss is the mean
over its own rows, and gradients are averaged over the ranks. The weights of the rows are such that sums over ranks are
these averages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..ranks import Ranks
from .batches import Batch, make_batch
from .epoch_plan import epoch_windows
from .loss_columns import IN_BATCH, Negatives
from .sequences import Sequences

WINDOW_BATCHES = 64  # whose users are taken from the epoch's order at a time


def local_batches(
    sequences: Sequences,
    batch_users: int,
    seed: int,
    epoch: int,
    ranks: Ranks,
    taken: int = 0,
    negatives: Negatives = IN_BATCH,
) -> Iterator[Batch]:
    """Yield a batch of this rank's users for each batch of an epoch, in order; users are shared out as by `share`.

    The arguments are those of `epoch_batches`. A batch with fewer users than ranks is averaged over the ranks that have
    one; each of the others takes the first user with weight 0.
    """
    for step, users in _users_of_batches(sequences, batch_users, seed, epoch, taken):
        count = len(users)
        its_users = users[count * ranks.rank // ranks.count : count * (ranks.rank + 1) // ranks.count]
        part = 1 / min(count, ranks.count) if len(its_users) else 0.0
        batch = make_batch(sequences, its_users if part else users[:1], step, negatives)
        yield replace(batch, weights=batch.weights * part)


def batch_slots(sequences: Sequences, batch_users: int, seed: int, epoch: int, taken: int = 0) -> Iterator[int]:
    """Yield the items in the histories of each batch of an epoch, those of all ranks. Arguments: of `epoch_batches`."""
    lengths = sequences.training_lengths
    for _, users in _users_of_batches(sequences, batch_users, seed, epoch, taken):
        yield int(lengths[users].sum())


def _users_of_batches(
    sequences: Sequences, batch_users: int, seed: int, epoch: int, taken: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the step number of each batch of an epoch, and the users of all ranks in it, int64."""
    for window in epoch_windows(sequences, batch_users, seed, epoch, WINDOW_BATCHES, taken=taken):
        for number, start in enumerate(range(0, len(window.users), batch_users)):
            yield window.first_step + number, window.users[start : start + batch_users]
