"""The benchmark of long histories: the dataset that it makes, how it runs commands, and what it reports."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from iisan_fast.benchmarks import long_histories, made_histories
from iisan_fast.benchmarks.harness import Setup
from iisan_fast.benchmarks.made_histories import LONGEST, SHORTEST, write_histories
from iisan_fast.benchmarks.result_tables import histories_tables
from iisan_fast.benchmarks.settings import HistoriesSettings
from iisan_fast.data import parsed_cache
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError


def test_the_dataset_has_the_interactions_and_popular_items(tmp_path, monkeypatch):
    monkeypatch.setattr(made_histories, "USERS_AT_ONCE", 300)
    parts: list[int] = []
    write_histories(tmp_path / "d", 20_000, 50, parts.append)
    lines = (tmp_path / "d" / "users.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"u{user:04d}" for user in range(2222)]
    sequences = load_dataset(tmp_path / "d").sequences
    lengths = np.diff(sequences.offsets)
    assert sum(parts) == len(sequences.items) == pytest.approx(20_000, rel=0.02) and len(parts) == 8
    assert (lengths.min(), lengths.max()) == (SHORTEST, LONGEST) and len(sequences.item_ids) == 50
    counts = np.sort(np.bincount(sequences.items)[1:])[::-1]
    assert counts[0] == pytest.approx(len(sequences.items) * np.log(2) / np.log(51), rel=0.1)  # as 1 / rank
    assert counts[0] > 10 * counts[-1] > 0


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that puts a shell script in the place of Python."""

    def write(script: str) -> None:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


def test_a_command_is_run_in_its_cache_watched_and_stopped(tmp_path, program):
    program('echo "$IISAN_FAST_PARSED $@"; echo hint >&2')
    figures, printed = long_histories.command_figures(tmp_path, ["stats", "DATASET"])
    assert printed == f"{tmp_path}/parsed -m iisan_fast stats DATASET\n" and figures["seconds"] > 0
    program(
        f"trap 'echo stopped; exit 143' TERM; touch {shlex.quote(str(tmp_path / 'made'))}; while :; do sleep 0.02; done"
    )
    figures, printed = long_histories.command_figures(tmp_path, ["train"], stop_at=tmp_path / "made")
    assert printed == "stopped\n"
    if sys.platform == "linux":
        assert 0 < figures["private_bytes"] < 16 << 20 and figures["file_bytes"] > 0


def test_a_command_that_fails_or_takes_too_long_ends(tmp_path, program, monkeypatch):
    program("echo first >&2; echo no room >&2; exit 3")
    with pytest.raises(InputError, match="stats: ended with code 3: no room"):
        long_histories.command_figures(tmp_path, ["stats"])
    program("exit 0")
    with pytest.raises(InputError, match="train: ended with code 0: it printed no message"):
        long_histories.command_figures(tmp_path, ["train"], stop_at=tmp_path / "never")
    program("exec sleep 60")
    monkeypatch.setattr(long_histories, "LONGEST", 0.1)
    with pytest.raises(InputError, match="train: took longer than 0.1 seconds"):
        long_histories.command_figures(tmp_path, ["train"])


@pytest.mark.long
def test_both_commands_are_measured(tmp_path):
    settings = HistoriesSettings(interactions=3_000_000, items=2000, steps=20, users=16, embedding_dim=8)
    result = long_histories.measure_histories(Setup(None, torch.device("cpu"), tmp_path / "kept"), settings)
    first, again, trained = result["rows"]
    assert result["counts"]["interactions"] == pytest.approx(3_000_000, rel=0.01)
    assert result["users_tsv_bytes"] > parsed_cache.LEAST_BYTES and result["parsed_bytes"] > 4 * 3_000_000
    assert again["seconds"] < first["seconds"] and trained["steps"] >= 20 and trained["step_ms"] > 0
    (table,) = histories_tables(result)
    assert [row["what"] for row in table.sections[0]] == ["stats, first", "stats, again", "train"]
    assert Path(tmp_path / "kept" / "dataset").is_dir() and signal.SIGTERM + 128 == long_histories.STOPPED
