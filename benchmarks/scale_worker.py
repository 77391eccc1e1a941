"""Take training steps over one table of a made cache, alone or as a rank of a job: one measurement of `bench scale`.

    python -m iisan_fast.benchmarks.scale_worker MEASUREMENT

MEASUREMENT is JSON with the fields of `TableMeasurement`. Rank 0 writes the figures, as JSON, into its file `out`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import runtime
from ..config import RunConfig, TrainConfig
from ..files import write_atomically
from ..precision import resolve_precision
from ..ranks import joined_ranks
from ..states import FeatureTable, ItemSource, load_table
from ..training import Trainer, deterministic
from .counted_ranks import CountedRanks
from .growth import histories
from .made_states import VIEWS, made_ids
from .private_memory import PrivateMemory
from .stopwatch import quantiles

CPU = torch.device("cpu")
WARM_UP_STEPS = 5
USERS_AN_ITEM = 0.6  # as in Scientific


@dataclass(frozen=True)
class TableMeasurement:
    """The table over which steps are taken, and the steps."""

    cache: str
    items: int
    table: str  # one of config.PLACEMENTS
    steps: int
    users: int  # a batch
    seed: int
    out: str  # file for the figures


def main() -> None:
    """Measure, and write the figures."""
    runtime.prepare()
    measurement = TableMeasurement(**json.loads(sys.argv[1]))
    ranks = CountedRanks.of(joined_ranks())
    with PrivateMemory() as memory, deterministic():
        figures = measured(measurement, ranks)
    of_ranks = ranks.from_all({"private_bytes": memory.peak, "file_bytes": memory.files, **figures})
    if ranks.is_first:
        write_atomically(Path(measurement.out), json.dumps(of_ranks).encode())


def measured(measurement: TableMeasurement, ranks: CountedRanks) -> dict[str, Any]:
    """Return the losses, times and bytes of the steps on this rank.

    received_bytes: a step, from other ranks: rows of the table, and the vectors and gradients of the step.
    """
    started = time.perf_counter()
    batch_users = measurement.users
    users = max(int(USERS_AN_ITEM * measurement.items), (WARM_UP_STEPS + measurement.steps) * batch_users)
    sequences = histories(measurement.items, users)
    sequences.item_ids[:] = made_ids(measurement.items)
    drawn = time.perf_counter()
    cache = Path(measurement.cache)
    with closing(load_table(cache, VIEWS, sequences.item_ids, CPU, measurement.table, ranks=ranks)) as table:
        loaded = time.perf_counter()
        gathering = Gathering.of(table, ranks)
        train = TrainConfig(batch_users=batch_users, seed=measurement.seed)
        config = RunConfig("", "", VIEWS, train=train)
        trainer = Trainer(config, sequences, table, CPU, resolve_precision(config, CPU), ranks=ranks)
        trainer.model.train()
        losses, times = taken_steps(trainer, WARM_UP_STEPS + measurement.steps)
    timed = np.array(times[WARM_UP_STEPS:])
    return {
        "draw_s": drawn - started,
        "load_s": loaded - drawn,
        "losses": losses,
        **quantiles(timed.sum(axis=1) * 1000, "ms"),
        "waited_ms": 1000 * float(np.median(timed[:, 0])),
        "waited_share": float(timed[:, 0].sum() / timed.sum()),
        **gathering.figures(len(losses)),
    }


def taken_steps(trainer: Trainer, count: int) -> tuple[list[float], list[tuple[float, float]]]:
    """Take steps of the first epoch, and return their losses, and the seconds of the wait and of the step."""
    losses: list[float] = []
    times: list[tuple[float, float]] = []
    with closing(trainer.batches(0)) as batches:
        for _ in range(count):
            started = time.perf_counter()
            batch = next(batches)
            arrived = time.perf_counter()
            losses.append(float(trainer.take(batch)))
            times.append((arrived - started, time.perf_counter() - arrived))
    return losses, times


class Gathering:
    """The times and the bytes with which a table's rows are gathered, in the loader's thread."""

    def __init__(self, gather: Callable[[Tensor], Any], ranks: CountedRanks) -> None:
        """Take a table's function that gathers, and count from now on."""
        self.ranks = ranks
        self.seconds: list[float] = []
        self.items: list[int] = []
        self._gather = gather
        ranks.received.clear()

    @classmethod
    def of(cls, table: ItemSource, ranks: CountedRanks) -> Gathering:
        """Watch a table; one on the device gathers nothing."""
        gathering = cls(table.gather, ranks)
        if not isinstance(table, FeatureTable):
            table.gather = gathering  # type: ignore[method-assign]
        return gathering

    def __call__(self, items: Tensor) -> Any:
        """Gather the rows of items."""
        started = time.perf_counter()
        gathered = self._gather(items)
        self.seconds.append(time.perf_counter() - started)
        self.items.append(len(items))
        return gathered

    def figures(self, steps: int) -> dict[str, Any]:
        """Return the medians of a batch, and the bytes that a step received from other ranks."""
        received = self.ranks.received
        batches = max(1, len(self.seconds))  # more than the steps: some were gathered ahead and not taken
        return {
            "gather_ms": 1000 * float(np.median(self.seconds)) if self.seconds else None,
            "gathered_items": float(np.median(self.items)) if self.items else None,
            "received_bytes": {
                "rows": round(received["exchange"] / batches),
                "vectors": round((received["gather_blocks"] + received["add_blocks"]) / steps),
                "weights": round(received["add_up"] / steps),
            },
        }


if __name__ == "__main__":
    main()
