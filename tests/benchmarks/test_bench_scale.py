"""The benchmark of large catalogues: the cache that it makes, what a measurement reports, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from iisan_fast.benchmarks import made_states, scale
from iisan_fast.benchmarks.catalogue import BY_NAME
from iisan_fast.benchmarks.counted_ranks import CountedRanks
from iisan_fast.benchmarks.harness import Setup
from iisan_fast.benchmarks.private_memory import PrivateMemory
from iisan_fast.benchmarks.scale_worker import WARM_UP_STEPS, TableMeasurement, measured
from iisan_fast.benchmarks.settings import ScaleSettings
from iisan_fast.errors import InputError
from iisan_fast.ranks import ALONE
from iisan_fast.states import Store, load_table

CPU = torch.device("cpu")
ITEMS = 60
TINY = ScaleSettings(items=(20, ITEMS), steps=3, users=4, layers=3, width=16)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(made_states, "BLOCK", 25)
    made_states.make_states(tmp_path / "cache", ITEMS, 3, 16, lambda count: None)
    return tmp_path / "cache"


def test_the_cache_is_sound_and_made_once(cache):
    table = load_table(cache, ["second"], made_states.made_ids(ITEMS), CPU, "device")
    (view,) = table.views
    assert view.shape == (ITEMS + 1, 3, 16) and view.dtype == torch.bfloat16
    assert torch.equal(view[1:26], view[26:51]) and len(view[1:26].unique(dim=0)) == 25
    with Store(cache) as store:
        assert None not in store.sound_digests("first", made_states.made_ids(ITEMS))
    before = (cache / "states.lmdb" / "data.mdb").read_bytes()
    written = []
    made_states.make_states(cache, ITEMS, 3, 16, written.append)
    assert written == [25, 25, 10] and (cache / "states.lmdb" / "data.mdb").read_bytes() == before
    made_states.make_states(cache, ITEMS + 20, 3, 16, written.append)
    larger = load_table(cache, ["second"], made_states.made_ids(ITEMS + 20), CPU, "device")
    assert torch.equal(larger.views[0][1 : ITEMS + 1], view[1:]) and torch.equal(larger.views[0][76:], view[1:6])
    with pytest.raises(InputError, match="made with other settings"):
        made_states.make_states(cache, ITEMS, 3, 32, written.append)


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")(0, 0, 1 << 20)
    monkeypatch.setattr(made_states.shutil, "disk_usage", lambda path: usage)
    message = "1,000 items need 25 MiB of disk, found 1 MiB free; lower --items, or choose another folder by --keep"
    with pytest.raises(InputError, match=message):
        made_states.make_states(tmp_path / "cache", 1000, 7, 768, lambda count: None)


@pytest.mark.parametrize("table", ["device", "mapped"])
def test_a_measurement_reports_times_losses_and_bytes(cache, table):
    measurement = TableMeasurement(str(cache), 20, table, 3, 4, 0, "")
    figures = measured(measurement, CountedRanks.of(ALONE))
    assert len(figures["losses"]) == WARM_UP_STEPS + 3
    assert figures["losses"] == measured(measurement, CountedRanks.of(ALONE))["losses"]
    assert figures["p20_ms"] <= figures["p50_ms"] <= figures["p80_ms"]
    assert 0 <= figures["waited_share"] < 1
    assert (figures["gather_ms"] is None) == (table == "device")
    assert figures["received_bytes"] == {"rows": 0, "vectors": 0, "weights": 0}


def test_private_memory_grows_with_what_is_held():
    with PrivateMemory() as before:
        pass
    with PrivateMemory() as memory:
        held = torch.ones(16 << 20)
    if sys.platform == "linux":
        assert memory.peak - before.peak == pytest.approx(held.nbytes, rel=0.25)
    else:
        assert memory.peak is None


def test_a_table_that_does_not_fit_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "free_memory", lambda device: 1 << 20)
    row = scale.measured_row(tmp_path, 1_000_000, "device", 1, ScaleSettings())
    assert (
        row["why"] == "needs 20.0 GiB, more than 70% of the 1 MiB free"
        and row["table_bytes"] == 2 * 1_000_001 * 7 * 768 * 2
    )


def test_a_measurement_that_fails_or_takes_too_long_ends(tmp_path, monkeypatch):
    program = tmp_path / "program"
    monkeypatch.setattr(sys, "executable", str(program))
    measurement = TableMeasurement("cache", 20, "mapped", 3, 4, 0, "")
    program.write_text("#!/bin/sh\necho no cache\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(InputError, match="20 items, mapped, 1 ranks: the process ended with code 3: no cache"):
        scale.run_worker(measurement, 1)
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(scale, "LONGEST", 0.1)
    with pytest.raises(InputError, match="not measured within 0.1 seconds"):
        scale.run_worker(measurement, 1)


def test_losses_that_are_not_those_of_one_rank_are_refused():
    row = {"items": 20, "table": "sharded"}
    figures = scale.differences(row, [2.0, 1.0001], [2.0, 1.0])
    assert figures["first_difference"] == 0 and figures["loss_difference"] == pytest.approx(1e-4)
    for losses in ([2.0, 1.002], [2.0, float("nan")], [float("nan"), 1.0]):
        with pytest.raises(InputError, match="20 items, sharded: expected the losses of one rank"):
            scale.differences(row, losses, [2.0, 1.0])


def rows() -> list[dict]:
    """Return rows of a result: the larger catalogue does not fit into memory."""
    measured_figures = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "waited_ms": 0.1, "gather_ms": 1.5}
    measured_figures |= {"private_bytes": 3 << 30, "received_bytes": {"rows": 1 << 20}, "loss_difference": 1e-7}
    return [
        {"items": 20, "table": "mapped", "ranks": 1, "table_bytes": 1 << 30, **measured_figures},
        {"items": 20, "table": "sharded", "ranks": 2, "table_bytes": 1 << 30, **measured_figures},
        {"items": 60, "table": "mapped", "ranks": 1, "table_bytes": 2 << 30, **measured_figures, "p50_ms": 4.0},
        {"items": 60, "table": "sharded", "ranks": 2, "table_bytes": 2 << 30, "why": "needs 2.0 GiB"},
    ]


def test_the_drawing_has_a_line_for_each_table(monkeypatch, tmp_path):
    lines: dict[str, list] = {"times": [], "memory": []}

    def panel(name: str) -> SimpleNamespace:
        nothing = dict.fromkeys(("set", "set_ylim", "set_yscale"), lambda *_, **__: None)
        return SimpleNamespace(plot=lambda x, y, _, label: lines[name].append((label, x, y)), **nothing)

    @contextmanager
    def panels(path, title):
        assert title == "Steps of 64 users, 2 views of 7 layers of 768; cpu, 2 threads"
        yield panel("times"), panel("memory")

    monkeypatch.setattr(scale, "two_panels", panels)
    settings = {"users": 64, "layers": 7, "width": 768}
    scale.draw({"rows": rows(), "settings": settings, "environment": {"device": "cpu", "threads": 2}}, tmp_path / "x")
    assert lines["times"] == [("in the cache's file, 1 rank", [20, 60], [2.0, 4.0]), ("sharded, 2 ranks", [20], [2.0])]
    assert lines["memory"][-1] == ("the whole table", [20, 60], [1.0, 2.0])


def test_the_table_shows_why_a_row_has_no_figures():
    (table,) = BY_NAME["scale"].tables({"rows": rows(), "settings": {"users": 64, "layers": 7, "width": 768}})
    texts = [[column.text(row) for column in table.columns] for section in table.sections for row in section]
    assert texts[1] == ["20", "sharded", "2", "1 / 2 / 3", "0.1", "1.5", "3,072", "1.0", "1e-07"]
    assert texts[3] == ["60", "sharded", "2", "needs 2.0 GiB", "", "", "", "", ""]


@pytest.mark.long
def test_all_tables_are_measured_in_processes_of_their_own(tmp_path):
    figures = scale.measure_scale(Setup(None, CPU, tmp_path / "cache"), TINY)
    assert [(row["items"], row["table"], row["ranks"]) for row in figures["rows"]] == [
        (items, table, ranks)
        for items in (20, ITEMS)
        for table, ranks in (("mapped", 1), ("device", 1), ("sharded", 2))
    ]
    for row in figures["rows"]:
        assert row["loss_difference"] < 1e-4
        assert (row["received_bytes"]["rows"] > 0) == (row["table"] == "sharded")
    assert json.dumps(figures)
