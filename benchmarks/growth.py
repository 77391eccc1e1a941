"""The time of epochs and evaluations against users a batch and catalogue size.

Histories are synthetic, over catalogues of up to a million items; a few popular items hold most interactions. States
are random and repeat every 20,000 items, since times do not depend on their values.
"""

from __future__ import annotations

import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import EvaluationConfig, RunConfig, TrainConfig
from ..data import Sequences
from ..evaluation import evaluate
from ..precision import resolve_precision
from ..progress import progress_bar
from ..states import FeatureTable
from ..training import Trainer, deterministic
from .captures import capture_step
from .drawing import two_panels
from .harness import Setup
from .machine import on, synchronise
from .settings import GrowthSettings

BLOCK = 20_000  # items whose states differ
SHORTEST, LONGEST = 5, 13  # histories
POPULARITY = 3.0  # an item's number is a uniform number to this power
WARM_UP_STEPS = 3
NOTES = {
    "epoch_s": "one epoch's steps, after some to warm up",
    "capture_s": "seconds to capture the step in a CUDA graph, before the epoch is timed",
    "evaluation_s": "one evaluation of all users; on CUDA the second one, the first compiles its kernels",
}


def measure_growth(setup: Setup, settings: GrowthSettings) -> dict[str, Any]:
    """Time an epoch and an evaluation for every catalogue and number of users a batch."""
    device = setup.device
    rows: list[dict[str, Any]] = []
    count = len(settings.items) * len(settings.batch_users)
    with on(device), deterministic(), progress_bar("growth", count, "epochs") as advance:
        for items in settings.items:
            sequences = histories(items, settings.users)
            table = FeatureTable(tuple(states(items, settings, seed, device) for seed in (0, 1)))
            for users in settings.batch_users:
                rows.append({"items": items, "batch_users": users, **measure(sequences, table, users, device)})
                advance(1, f"{items:,} items, {users:,} users a batch")
    return {"notes": NOTES, "rows": rows}


def histories(items: int, users: int) -> Sequences:
    """Draw random histories over a catalogue."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(SHORTEST, LONGEST + 1, users)
    numbers = (items * generator.random(lengths.sum()) ** POPULARITY).astype(np.int64) + 1
    return Sequences(
        user_ids=[f"u{user}" for user in range(users)],
        item_ids=[f"i{item}" for item in range(items)],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=numbers,
        max_inputs=LONGEST - 3,
    )


def states(items: int, settings: GrowthSettings, seed: int, device: torch.device) -> Tensor:
    """Draw one view's states: bf16 [items + 1, layers, width]."""
    generator = torch.Generator().manual_seed(seed)
    shape = settings.layers, settings.width
    block = torch.randn(min(BLOCK, items), *shape, generator=generator).bfloat16().to(device)
    table = torch.zeros(items + 1, *shape, dtype=torch.bfloat16, device=device)
    for start in range(1, items + 1, len(block)):
        part = table[start : start + len(block)]
        part.copy_(block[: len(part)])
    return table


def measure(sequences: Sequences, table: FeatureTable, users: int, device: torch.device) -> dict[str, Any]:
    """Time one epoch's steps, after the step is captured and some steps are taken, and one evaluation."""
    config = RunConfig("", "", ("first", "second"), train=TrainConfig(batch_users=users))
    trainer = Trainer(config, sequences, table, device, resolve_precision(config, device))
    trainer.model.train()
    capture_s = capture_step(trainer)
    with closing(trainer.batches(0)) as batches:
        for batch in islice(batches, WARM_UP_STEPS):
            trainer.take(batch)
    started = now(device)
    for batch in trainer.batches(0):
        trainer.take(batch)
    epoch = now(device) - started
    trainer.model.eval()
    if device.type == "cuda":
        evaluate_once(trainer, sequences, table)
    started = now(device)
    evaluate_once(trainer, sequences, table)
    return {"epoch_s": epoch, "capture_s": capture_s, "evaluation_s": now(device) - started}


def evaluate_once(trainer: Trainer, sequences: Sequences, table: FeatureTable) -> None:
    """Rank the validation targets of all users in the whole catalogue."""
    vectors = trainer.model.catalogue_vectors(table)
    queries = trainer.model.user_states(vectors, sequences.split("validation").inputs)
    evaluate(queries, vectors, sequences, "validation", EvaluationConfig())


def now(device: torch.device) -> float:
    """Wait for the device and return the time in seconds."""
    synchronise(device)
    return time.perf_counter()


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a PNG of two panels: epochs against users a batch, epochs and evaluations against the catalogue."""
    rows, settings, environment = result["rows"], result["settings"], result["environment"]
    shape = f"2 views of {settings['layers']} layers of {settings['width']}"
    title = f"IISAN, {shape}; {environment['device']}, {environment['threads']} threads"
    with two_panels(path, title) as (by_users, by_items):
        for count in settings["items"]:
            of_size = [row for row in rows if row["items"] == count]
            by_users.plot(
                *zip(*((row["batch_users"], row["epoch_s"]) for row in of_size)), "o-", label=f"{count:,} items"
            )
        for count in settings["batch_users"]:
            of_size = [row for row in rows if row["batch_users"] == count]
            label = f"epoch, {count:,} users a batch"
            by_items.plot(*zip(*((row["items"], row["epoch_s"]) for row in of_size)), "o-", label=label)
        times = [[row["evaluation_s"] for row in rows if row["items"] == count] for count in settings["items"]]
        middle = [float(np.median(seconds)) for seconds in times]
        by_items.plot(settings["items"], middle, "s--", color="black", label="evaluation: all users, whole catalogue")
        by_users.set(
            xlabel="users a batch", ylabel="seconds", title=f"An epoch of {settings['users']:,} users", xscale="log"
        )
        by_users.set_xticks(settings["batch_users"], [f"{count:,}" for count in settings["batch_users"]])
        by_users.set_xticks([], minor=True)
        by_users.set_ylim(bottom=0)
        by_items.set(
            xlabel="items in the catalogue", ylabel="seconds", title="Catalogue size", xscale="log", yscale="log"
        )
