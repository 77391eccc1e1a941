"""The benchmark of reading: each reader's figures, and a refusal to compare readers of different data."""

from __future__ import annotations

from pathlib import Path

import pytest

from iisan_fast.benchmarks import reading
from iisan_fast.data import load_dataset

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_reader_has_a_time_and_a_peak():
    result = reading.compare(before=ROOT, interactions=3000, rounds=1)
    assert result["command"].endswith("reading --before=CHECKOUT --interactions=3000 --rounds=1")
    for reader in ("before", "polars", "strict"):
        assert 0 < result[reader]["seconds"] < 60 and result[reader]["cpu_seconds"] > 0
        assert result[reader]["peak_rss_bytes"] > 1 << 20


@pytest.mark.slow
def test_a_large_dataset_is_parsed_in_each_reading_and_read_as_a_small_one(tmp_path, monkeypatch):
    monkeypatch.setenv("IISAN_FAST_PARSED", str(tmp_path / "parsed"))
    reading.write_dataset(tmp_path, 3000)
    plain = reading.read(tmp_path, ROOT, [])
    worker = tmp_path / "worker.py"
    lower = "    from iisan_fast.data import parsed_cache\n    parsed_cache.LEAST_BYTES = 0\n"
    line = "    dataset = load_dataset("
    assert line in reading.WORKER.read_text()
    worker.write_text(reading.WORKER.read_text().replace(line, lower + line))
    monkeypatch.setattr(reading, "WORKER", worker)
    assert reading.read(tmp_path, ROOT, [])["digest"] == plain["digest"]
    assert not (tmp_path / "parsed").exists()  # the arrays of a reading are found by no other


def test_the_dataset_has_the_interactions_that_are_asked_for(tmp_path):
    reading.write_dataset(tmp_path, 3000)
    words = (tmp_path / "users.tsv").read_text().replace("\t", " ").splitlines()
    lengths = [len(line.split(" ")) - 1 for line in words]
    assert sum(lengths) == 3000 and min(lengths) == reading.SHORTEST
    assert 300 < len(load_dataset(tmp_path).sequences.user_ids) < 400


def test_readers_of_different_data_are_not_compared(monkeypatch):
    digests = iter("ab")
    figures = {"seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1}
    monkeypatch.setattr(reading, "read", lambda *_: {**figures, "digest": next(digests)})
    with pytest.raises(ValueError, match="expected equal datasets of all readers, found 2"):
        reading.compare(before=None, interactions=3000, rounds=1)
