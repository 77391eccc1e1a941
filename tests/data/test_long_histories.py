"""Nothing copies all interactions of a large dataset in memory: not parsing, counting, planning or saving."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from iisan_fast import checksums
from iisan_fast.benchmarks.made_histories import write_histories
from iisan_fast.data import fast_tables, growing_arrays, jagged_arrays, parsed_cache, text_array
from iisan_fast.data.batches import Batch, epoch_batches, padded_shape
from iisan_fast.data.sequences import Sequences, load_dataset, statistics
from iisan_fast.models.cooccurrence import CoOccurrence

INTERACTIONS = 200_000
ITEMS = 500
BLOCK = 1 << 14  # interactions in work at a time
MOST_BYTES = {"parsing": 130, "loading": 20, "counting": 120, "planning": 60, "saving": 110, "pairs": 150}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("long") / "d"
    write_histories(root, INTERACTIONS, ITEMS, lambda count: None)
    return root


@pytest.fixture
def small_blocks(tmp_path, monkeypatch) -> None:
    """Cache the dataset, and work on a small part of it at a time."""
    monkeypatch.setenv(parsed_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(parsed_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(fast_tables, "LEAST_BYTES", 0)
    monkeypatch.setattr(fast_tables, "BLOCK_BYTES", 1 << 17)
    for module in (text_array, growing_arrays):
        monkeypatch.setattr(module, "TEXTS_AT_ONCE", 1 << 10)
    monkeypatch.setattr(checksums, "BYTES_AT_ONCE", 1 << 16)
    monkeypatch.setattr(parsed_cache, "BYTES_AT_ONCE", 1 << 16)
    monkeypatch.setattr(jagged_arrays.row_blocks, "__defaults__", (BLOCK,))


def peak_of(work: Callable[[], Any]) -> tuple[int, Any]:
    """Return the most bytes that Python and numpy held more than before, and the result."""
    tracemalloc.start()
    result = work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak, result


def test_the_memory_is_that_of_users_not_of_interactions(folder, small_blocks, tmp_path):
    """A user's nine interactions take 72 bytes as int64, and copies of them took 140 to 520 bytes a user."""
    pytest.importorskip("polars")
    load_dataset(folder)  # imports all that is needed
    shutil.rmtree(tmp_path / "cache")
    peaks = {}
    peaks["parsing"], _ = peak_of(lambda: load_dataset(folder))
    peaks["loading"], dataset = peak_of(lambda: load_dataset(folder))
    sequences = dataset.sequences
    peaks["counting"], counts = peak_of(lambda: statistics(sequences))
    peaks["planning"], batches = peak_of(lambda: plan(sequences))
    peaks["saving"], _ = peak_of(lambda: sequences.save(tmp_path / "s.npz"))
    peaks["pairs"], _ = peak_of(lambda: CoOccurrence.of(sequences, 20, block_bytes=1 << 19))
    assert counts["interactions"] == len(sequences.items) > 190_000 and len(batches) == 60
    users = len(sequences.user_ids)
    assert {name: peak / users for name, peak in peaks.items() if peak > MOST_BYTES[name] * users} == {}


def plan(sequences: Sequences) -> list[Batch]:
    """Return the first batches of an epoch, as a run takes them."""
    padded_shape(sequences, 16)
    return list(islice(epoch_batches(sequences, 16, 0, 0, window_batches=20), 60))
