"""Check tables whose rows lie on several ranks: the rows of one table, memory, bytes exchanged, and refusals."""

from __future__ import annotations

import shutil
import socket
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers.rank_processes import run_on_ranks
from helpers.stores import fill_store
from helpers.table_rank_calls import counted_exchange, opened, placed, refused, sharded_rows, trained
from helpers.tables import random_table
from iisan_fast.states.feature_table import FeatureTable, PinnedTable, load_table

CPU = torch.device("cpu")
IDS = [f"i{i}" for i in range(1, 12)]
ROW_BYTES = 4 * (2 * 4 + 3 * 5)
GIB = 1 << 30
ON_RANK_1 = f"rank 1 on {socket.gethostname()}"  # before an error that rank 1 alone meets
LISTS = [  # for each gathering, the items of each rank
    [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11]],
    [[11, 3, 3, 1, 0, 0], [], [7]],
    [[], [], []],
    [[0], [6, 6], [2, 4, 6, 8, 10]],
]


@pytest.fixture(scope="module")
def whole() -> FeatureTable:
    """Return a table of eleven items' states in two views of different shapes."""
    return random_table([(2, 4), (3, 5)], len(IDS), torch.float32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, whole) -> Path:
    return fill_store(tmp_path_factory.mktemp("states") / "cache", IDS, whole, ("a", "b"))


@pytest.mark.parametrize("count", [2, 3])
def test_every_rank_gathers_any_rows_and_holds_its_items_alone(cache, whole, count):
    results = run_on_ranks(count, sharded_rows, cache, IDS, LISTS)
    for rank, result in enumerate(results):
        assert sum(rows.nbytes for rows in result["shard"]) == ROW_BYTES * len(range(rank, 12, count))
        for rows, view in zip(result["shard"], whole.views, strict=True):
            assert torch.equal(rows, view[rank::count])
        for of_ranks, gathered, received in zip(LISTS, result["gathered"], result["received"], strict=True):
            for rows, view in zip(gathered, whole.views, strict=True):
                assert torch.equal(rows, view[of_ranks[rank]])
            rows_of_others = sum(item % count != rank for item in of_ranks[rank])
            numbers = sum(item % count == rank for items in of_ranks[:count] for item in items)
            numbers_of_others = numbers - len(of_ranks[rank]) + rows_of_others
            assert received == ROW_BYTES * rows_of_others + 4 * numbers_of_others + 8 * (count - 1)


def test_a_gathering_exchanges_counts_numbers_and_rows(cache):
    count = 3
    items = [torch.arange(1, 5), torch.arange(5, 9), torch.arange(9, 12)]
    for rank, counted in enumerate(run_on_ranks(count, counted_exchange, cache, IDS, items)):
        of_others = [item for item in items[rank].tolist() if item % count != rank]
        others_want = sum((other % count == rank).sum().item() for other in items) - len(items[rank]) + len(of_others)
        rows = len(of_others)
        assert counted == [8 * (count - 1), 4 * others_want, 4 * 2 * 4 * rows, 4 * 3 * 5 * rows]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_standardised_shards_are_one_standardised_table(tmp_path, dtype):
    table = random_table([(2, 4), (3, 5)], len(IDS), torch.float32)
    for view in table.views:
        view[1:] = view[1:] * 3 + 1000
        view[1:, 0, 2] = 0.1  # one number that is the same for all items
    cache = fill_store(tmp_path / "cache", IDS, table, ("a", "b"))
    alone = load_table(cache, ["a", "b"], IDS, CPU, "device", dtype, standardise=True)
    assert isinstance(alone, FeatureTable)
    results = run_on_ranks(3, partial(sharded_rows, standardise=True, dtype=dtype), cache, IDS, LISTS)
    for rank, result in enumerate(results):
        for name, figures in result["statistics"].items():
            for figure, of_first, expected in zip(
                figures, results[0]["statistics"][name], (alone.statistics[name].mean, alone.statistics[name].deviation)
            ):
                assert torch.equal(figure, of_first)
                torch.testing.assert_close(figure, expected, rtol=1e-12, atol=0)
        for of_ranks, gathered in zip(LISTS, result["gathered"]):
            for rows, view in zip(gathered, alone.views):
                torch.testing.assert_close(rows, view[of_ranks[rank]])
                assert not rows[:, 0, 2].any()


def test_one_rank_has_the_whole_table_in_host_memory(cache, whole):
    table = load_table(cache, ["a", "b"], IDS, CPU, "sharded")
    assert isinstance(table, PinnedTable) and torch.equal(table.views[1], whole.views[1])


@pytest.mark.parametrize("count", [2, 3])
def test_steps_over_shards_are_those_over_whole_tables(tmp_path, count):
    items = 50
    cache = fill_store(
        tmp_path / "cache",
        [f"i{i}" for i in range(1, items + 1)],
        random_table([(3, 16), (3, 16)], items, torch.float32),
        ("a", "b"),
    )
    for result in run_on_ranks(count, trained, cache, items, 2):
        whole = result["device"]
        sharded = result["sharded"]
        assert len(whole["losses"]) == 6 and whole["losses"] == sharded["losses"]
        assert whole["weights"].keys() == sharded["weights"].keys()
        for name, weight in whole["weights"].items():
            assert torch.equal(weight, sharded["weights"][name]), name
        assert torch.equal(whole["vectors"], sharded["vectors"])
        assert sharded["received"] > 0 == whole["received"]


# Bad input


def test_states_that_one_rank_lacks_are_refused_by_all(tmp_path, cache, whole):
    shutil.copytree(cache, tmp_path / "cache")
    lacking = [*IDS[:4], "new", *IDS[5:]]  # item 5, of rank 1
    messages = run_on_ranks(2, refused, [cache, tmp_path / "cache"], lacking)
    assert messages[0] == messages[1]
    assert messages[0].startswith(
        f"InputError: {ON_RANK_1}: {tmp_path / 'cache'}: view 'a' lacks 1 of 6 items (new); run iisan-fast"
    )


def test_other_states_on_one_rank_are_refused_by_all(tmp_path):
    table = random_table([(3, 16), (3, 16)], len(IDS), torch.float32)
    caches = [
        fill_store(tmp_path / "first", IDS, table, ("a", "b")),
        fill_store(tmp_path / "second", IDS, table, ("a", "b"), unescaped=False),
        tmp_path / "none",
    ]
    messages = run_on_ranks(3, opened, [caches[0], caches[1], caches[0]], IDS)
    assert (
        len(set(messages)) == 1 and "differs from rank 0: view 'a'.unescaped is false there, true here" in messages[0]
    )
    messages = run_on_ranks(2, opened, [caches[0], caches[2]], IDS)
    missing = f"{caches[2]}: not a cache of hidden states (no manifest.json); run iisan-fast extract"
    assert messages == [f"{ON_RANK_1}: {missing}"] * 2


def test_states_that_are_not_finite_on_one_rank_are_refused_by_all(tmp_path):
    table = random_table([(2, 4), (3, 5)], len(IDS), torch.float32)
    table.views[1][4, 2, 1] = torch.inf
    cache = fill_store(tmp_path / "cache", IDS, table, ("a", "b"))
    messages = run_on_ranks(3, partial(refused, standardise=True), [cache] * 3, IDS)
    assert len(set(messages)) == 1 and "'b': standardise: expected finite states" in messages[0]
    assert "(kept layer 3, number 2)" in messages[0]


# Placement


def test_ranks_place_a_table_together():
    cases = [
        ("auto", [4 * GIB, 4 * GIB], "device"),
        ("auto", [4 * GIB, 2 * GIB], "sharded"),  # all ranks take the slowest place that one of them needs
        ("auto", [4 * GIB, GIB], "mapped"),
        ("sharded", [GIB, GIB], "sharded"),
        (
            "sharded",
            [4 * GIB, 800 << 20],
            f"{ON_RANK_1}: table: sharded needs 512 MiB, found 400 MiB free; choose mapped, or leave it to auto",
        ),
    ]
    for results in run_on_ranks(2, placed, [(asked, free) for asked, free, _ in cases], GIB):
        assert [place for place, _ in results] == [expected for *_, expected in cases]
        assert "feature table: 1.0 GiB, in the host memory of 2 ranks, rows exchanged ahead" in results[1][1][0]
