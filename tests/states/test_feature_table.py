"""Check the feature table: its three places hold the same numbers, and wrong arguments are refused."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.run_folders import untimed
from helpers.stores import fill_store, view_description
from helpers.tables import random_table
from iisan_fast.errors import InputError
from iisan_fast.kernels import States
from iisan_fast.states import feature_table
from iisan_fast.states.feature_table import FeatureTable, MappedTable, PinnedTable, load_table
from iisan_fast.states.item_source import ItemSource
from iisan_fast.states.store import Store
from iisan_fast.training.checkpoints import load_checkpoint
from iisan_fast.training.start_run import train
from iisan_fast.training.trainer import Trainer

CPU = torch.device("cpu")
HOMES = {"device": FeatureTable, "pinned": PinnedTable, "mapped": MappedTable}
GIB = 1 << 30
IDS = [f"i{i}" for i in range(1, 11)]

each_placement = pytest.mark.parametrize("placement", HOMES)


@pytest.fixture
def whole() -> FeatureTable:
    """Return a table of ten items' states in two views of different shapes."""
    return random_table([(2, 4), (3, 5)], len(IDS), torch.float32)


@pytest.fixture
def cache(tmp_path, whole) -> Path:
    return fill_store(tmp_path / "cache", IDS, whole, ("a", "b"))


@pytest.fixture
def closed(monkeypatch) -> list[Path]:
    """Return a list that collects the stores that are closed."""
    paths = []
    original = Store.close

    def noted(self) -> None:
        paths.append(self.path)
        original(self)

    monkeypatch.setattr(Store, "close", noted)
    return paths


def rows(view: States) -> Tensor:
    return view.table if view.rows is None else view.table[view.rows]


def read(table: ItemSource, items: list[int]) -> list[Tensor]:
    return [rows(view) for view in table.read(torch.tensor(items, dtype=torch.int64, device=table.index_device))]


# Content


@each_placement
def test_every_home_gives_the_same_rows_and_zeros_for_padding(cache, whole, placement):
    table = load_table(cache, ["a", "b"], IDS, CPU, placement)
    assert type(table) is HOMES[placement] and table.shapes == [(2, 4), (3, 5)] and table.rows == len(IDS) + 1
    for items in ([1, 4, 10], [10, 3, 3, 1, 0, 0], [0], []):
        assert all(
            torch.equal(rows_read, view[items]) for rows_read, view in zip(read(table, items), whole.views, strict=True)
        )
    assert not any(view.any() for view in read(table, [0]))
    gathered = table.gather(torch.tensor([2, 5, 0]))
    assert len(gathered.tensors) == (0 if placement == "device" else 2)
    assert all(torch.equal(rows_read, view[[2, 5, 0]]) for rows_read, view in zip(gathered.tensors, whole.views))
    table.close()


@each_placement
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_home_converts_alike(cache, whole, placement, dtype):
    table = load_table(cache, ["b", "a"], IDS, CPU, placement, dtype)
    assert table.shapes == [(3, 5), (2, 4)]
    for rows_read, view in zip(read(table, [7, 2, 0]), whole.views[::-1], strict=True):
        assert rows_read.dtype == dtype and torch.equal(rows_read, view[[7, 2, 0]].to(dtype))
    table.close()


@each_placement
def test_a_view_keeps_its_own_dtype(tmp_path, placement):
    states = torch.randn(10, 2, 4)
    with Store(tmp_path / "c", writable=True) as store:
        store.add_views({"half": view_description(2, 4, dtype="bfloat16"), "whole": view_description(2, 4)})
        store.write("half", IDS, [b"d" * 16] * 10, states.bfloat16())
        store.write("whole", IDS, [b"d" * 16] * 10, states)
    table = load_table(tmp_path / "c", ["half", "whole"], IDS, CPU, placement)
    half, whole = read(table, [3, 1])
    assert torch.equal(half, states[[2, 0]].bfloat16()) and torch.equal(whole, states[[2, 0]])
    assert half.dtype == torch.bfloat16 and whole.dtype == torch.float32
    table.close()


@pytest.mark.parametrize("placement", ["device", "pinned"])
@pytest.mark.parametrize("at_once", [1, 3, 5, 9])
def test_a_catalogue_is_read_in_parts(cache, whole, placement, at_once, monkeypatch):
    monkeypatch.setattr(feature_table, "ITEMS_AT_ONCE", at_once)
    for dtype in (None, torch.bfloat16):
        table = load_table(cache, ["a", "b"], IDS, CPU, placement, dtype)
        for table_view, view in zip(table.views, whole.views, strict=True):
            assert torch.equal(table_view, view.to(dtype or torch.float32))


# Placement


@pytest.mark.parametrize(
    ("on_host", "home"), [(None, FeatureTable), (GIB, FeatureTable), (1000, MappedTable), (0, MappedTable)]
)
def test_a_cpus_table_goes_where_there_is_room(cache, on_host, home, monkeypatch):
    monkeypatch.setattr("iisan_fast.states.placement.free_memory", lambda device: on_host)
    table = load_table(cache, ["a", "b"], IDS, CPU)
    assert type(table) is home
    table.close()


def test_the_size_said_is_that_of_the_tables_dtype(tmp_path, monkeypatch, caplog):
    cache = fill_store(tmp_path / "c", ["x"] * 1, random_table([(16, 16384)], 1, torch.float32), ("v",))
    for dtype, size in ((None, 2), (torch.bfloat16, 1), (torch.float64, 4)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="iisan_fast"):
            load_table(cache, ["v"], ["x"], CPU, "mapped", dtype).close()
        assert caplog.messages[0].startswith(f"feature table: {size} MiB, in the store's file")  # padding counted


# Refusals, which leave nothing open


def test_an_unknown_home_is_refused(cache):
    with pytest.raises(InputError, match="table: expected one of auto, device, pinned, sharded, mapped, found 'disk'"):
        load_table(cache, ["a"], IDS, CPU, "disk")


@pytest.mark.parametrize("placement", ["device", "pinned"])
def test_a_home_that_is_too_small_is_refused_if_asked_for(cache, closed, placement, monkeypatch):
    monkeypatch.setattr("iisan_fast.states.placement.free_memory", lambda device: 100)
    with pytest.raises(InputError, match=f"table: {placement} needs"):
        load_table(cache, ["a", "b"], IDS, CPU, placement)
    assert closed == [cache]


def lacks_items(cache: Path) -> list[str]:
    return [*IDS, "absent"]


def has_states_of_another_size(cache: Path) -> list[str]:
    with Store(cache, writable=True) as store:
        store.write("b", ["i4"], [b"0" * 16], torch.randn(1, 3, 4))
    return IDS


@each_placement
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacks_items, r"view 'a' lacks 1 of 11 items \(absent\); run iisan-fast extract"),
        (has_states_of_another_size, "view 'b', item 'i4': expected 60 bytes of states, found 48; iisan-fast extract"),
    ],
)
def test_states_that_cannot_be_used_are_refused_at_once(cache, closed, placement, spoil: Callable, message):
    item_ids = spoil(cache)
    del closed[:]
    with pytest.raises(InputError, match=message):
        load_table(cache, ["a", "b"], item_ids, CPU, placement)
    assert closed == [cache]


@each_placement
def test_the_store_stays_open_for_a_mapped_table_alone(cache, closed, placement):
    del closed[:]
    table = load_table(cache, ["a"], IDS, CPU, placement)
    assert closed == ([] if placement == "mapped" else [cache])
    table.close()
    assert closed == [cache]
    with pytest.raises(InputError, match="no view 'c'; it has a, b"):
        load_table(cache, ["c"], IDS, CPU, placement)
    assert closed == [cache] * 2


# Training


def test_training_is_the_same_wherever_the_table_lies(tmp_path, toy_config, caplog):
    homes = {"device": "on cpu", "pinned": "in host memory, rows gathered ahead", "mapped": "in the store's file"}
    runs = {}
    results = []
    for placement, home in homes.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="iisan_fast"):
            results.append(train(toy_config, tmp_path / placement, CPU, placement=placement))
        assert f"feature table: 0 MiB, {home} (" in caplog.text
        runs[placement] = untimed(tmp_path / placement)
    assert len(runs["device"]) == 2 and runs["device"] == runs["pinned"] == runs["mapped"]
    assert results[0] == results[1] == results[2]
    for name in ("best.safetensors", "last.safetensors"):
        first, *other_checkpoints = (load_checkpoint(tmp_path / placement / name)[0] for placement in homes)
        for other_checkpoint in other_checkpoints:
            assert first.keys() == other_checkpoint.keys() and all(
                torch.equal(first[key], other_checkpoint[key]) for key in first
            )


@pytest.mark.parametrize("fails", [False, True])
def test_a_mapped_table_is_closed_at_the_end_of_training_when_nothing_reads_it(
    tmp_path, toy_config, fails, closed, monkeypatch
):
    """Reading the memory of a closed store would kill the process."""
    order = []
    left = []
    close = MappedTable.close
    read_rows = MappedTable._read
    take = Trainer.take

    def closing(self) -> None:
        left.extend(thread.name for thread in threading.enumerate() if thread.name.startswith("batches"))
        order.append("closed")
        close(self)

    def reading(self, *arguments) -> None:
        read_rows(self, *arguments)
        order.append("read")

    def taking(self, prepared):
        if fails and prepared.batch.step == 1:
            raise KeyboardInterrupt
        return take(self, prepared)

    for target, name, replacement in (
        (MappedTable, "close", closing),
        (MappedTable, "_read", reading),
        (Trainer, "take", taking),
    ):
        monkeypatch.setattr(target, name, replacement)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            train(toy_config, tmp_path / "run", CPU, placement="mapped")
    else:
        train(toy_config, tmp_path / "run", CPU, placement="mapped")
    assert order.count("closed") == 2 and order[-1] == "closed"  # the neighbour terms' table, then the run's
    assert "read" in order[order.index("closed") :]
    assert not left
    assert closed[-1] == Path(toy_config.cache)
