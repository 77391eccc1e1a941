"""Check the loader: batches come in order, prepared ahead; errors reach the caller, and no thread is left."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from helpers.datasets import make_sequences
from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast.data.batches import Batch, epoch_batches, padded_shape
from iisan_fast.data.packed_batches import RunPlan
from iisan_fast.errors import InputError
from iisan_fast.kernels import States
from iisan_fast.kernels.types import HEADER, StepBatch
from iisan_fast.states import loader
from iisan_fast.states.feature_table import FeatureTable, PinnedTable, load_table
from iisan_fast.states.item_source import Gathered
from iisan_fast.states.loader import AHEAD, PlannedBatch, planned_batches, prepared_batches

CPU = torch.device("cpu")
ITEMS = 30
SEQUENCES = make_sequences([[(user + 2 * i) % ITEMS + 1 for i in range(5 + user % 7)] for user in range(23)], ITEMS)
SHAPE = padded_shape(SEQUENCES, 4)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    assert not threads()
    yield
    assert not threads()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def epoch() -> list[Batch]:
    return list(epoch_batches(SEQUENCES, 4, seed=0, epoch=1))


def table(dtype: torch.dtype = torch.float32) -> FeatureTable:
    return random_table([(2, 4), (3, 5)], ITEMS, dtype)


def rows(view: States) -> Tensor:
    return view.table if view.rows is None else view.table[view.rows]


def test_the_batches_come_in_order_and_as_they_are():
    batches = epoch()
    resident = table()
    prepared_list = list(prepared_batches(iter(batches), resident, CPU))
    assert len(prepared_list) == 6 and all(
        prepared.batch is batch for prepared, batch in zip(prepared_list, batches, strict=True)
    )
    for prepared in prepared_list:
        assert prepared.rows == len(prepared.batch.targets) and prepared.slots == prepared.batch.multiplicity.sum()
        assert prepared.slots == prepared.rows + len(prepared.batch.users)  # each history has one row less than items
        assert [view.table is whole for view, whole in zip(prepared.item_inputs, resident.views)] == [True, True]
        assert all(view.rows is prepared.batch.distinct for view in prepared.item_inputs)


def test_an_empty_epoch_gives_nothing():
    assert list(prepared_batches(iter([]), table(), CPU)) == []


def test_batches_are_made_ahead_but_not_too_many(monkeypatch):
    drawn_steps = []
    gathered = []
    arrivals = threading.Semaphore(0)
    monkeypatch.setattr(loader, "TOGETHER", 2)

    class Counted(FeatureTable):
        def gather(self, items: Tensor) -> Gathered:
            gathered.append(items)
            arrivals.release()
            return super().gather(items)

    stream = prepared_batches(
        (drawn_steps.append(batch.step) or batch for batch in epoch()), Counted(table().views), CPU
    )
    assert not drawn_steps and not threads()  # nothing happens before the first batch is asked for
    for taken in range(1, 7):
        next(stream)
        assert len(gathered) <= taken + AHEAD and len(drawn_steps) <= taken + AHEAD + 1
        if taken <= 6 - AHEAD:  # the caller waits, while the loader gathers this many more
            for _ in range(1 + AHEAD if taken == 1 else 1):
                assert arrivals.acquire(timeout=20)
            assert len(gathered) == taken + AHEAD
            assert len(drawn_steps) == (taken + AHEAD + 1) // 2 * 2  # batches are checked in pairs
    assert list(stream) == [] and len(gathered) == len(drawn_steps) == 6


class Broken(FeatureTable):
    """A table whose third gathering fails."""

    def gather(self, items: Tensor) -> Gathered:
        if torch.equal(items, epoch()[2].distinct):
            raise InputError("the disk is gone")
        return Gathered([])


def broken_maker() -> Iterator[Batch]:
    yield from epoch()[:2]
    raise ZeroDivisionError("a batch of nobody")


@pytest.mark.parametrize(
    ("make", "source", "error"),
    [
        (broken_maker, table, ZeroDivisionError("a batch of nobody")),
        (
            lambda: iter(epoch()),
            lambda: FeatureTable(tuple(view[:ITEMS] for view in table().views)),  # one item short
            ValueError(f"batch.distinct: expected indices from 1 to {ITEMS - 1}, found {ITEMS}"),
        ),
        (lambda: iter(epoch()), lambda: Broken(table().views), InputError("the disk is gone")),
    ],
    ids=["making", "checking", "gathering"],
)
def test_an_error_comes_out_as_itself_and_ends_the_thread(make: Callable, source: Callable, error: Exception):
    taken = []
    with pytest.raises(type(error)) as raised:
        for prepared in prepared_batches(make(), source(), CPU):
            taken.append(prepared.batch.step)
    assert type(raised.value) is type(error) and str(raised.value) == str(error)
    assert taken == [batch.step for batch in epoch()][: len(taken)] and len(taken) < 3
    assert not threads()  # also while the error, with its stack frames, still exists


def test_an_error_of_padding_comes_out_too():
    with pytest.raises(ValueError, match="does not fit into"):
        list(prepared_batches(iter(epoch()), table(), CPU, epoch()[0].shape))


def test_leaving_early_ends_the_thread_and_makes_no_more(monkeypatch):
    monkeypatch.setattr(loader, "TOGETHER", 2)
    drawn_steps = []
    stream = prepared_batches((drawn_steps.append(batch.step) or batch for batch in epoch()), table(), CPU)
    next(stream)
    assert len(threads()) == 1
    stream.close()
    assert not threads() and len(drawn_steps) <= 2 + AHEAD


def test_leaving_waits_for_the_batch_at_hand():
    """A caller may close the table after it has left the loader, because nothing reads the table then."""
    entered = threading.Event()
    release = threading.Event()
    gathered = []

    class Slow(FeatureTable):
        def gather(self, items: Tensor) -> Gathered:
            if len(gathered) == 2:
                entered.set()
                assert release.wait(20)
            gathered.append(len(items))
            return Gathered([])

    stream = prepared_batches(iter(epoch()), Slow(table().views), CPU)
    next(stream)
    assert entered.wait(20)
    leaving = threading.Thread(target=stream.close)
    leaving.start()
    leaving.join(0.05)
    assert leaving.is_alive() and threads()
    release.set()
    leaving.join(20)
    assert not leaving.is_alive() and len(gathered) == 3


@pytest.mark.parametrize("placement", ["pinned", "mapped"])
@pytest.mark.parametrize("padded", [False, True])
def test_gathered_states_are_the_tables_rows(tmp_path, placement, padded):
    resident = table()
    cache = fill_store(tmp_path / "cache", SEQUENCES.item_ids, resident, ("a", "b"))
    away = load_table(cache, ["a", "b"], SEQUENCES.item_ids, CPU, placement)
    try:
        prepared_list = list(prepared_batches(iter(epoch()), away, CPU, SHAPE if padded else None))
    finally:
        away.close()
    assert len(prepared_list) == 6
    for prepared, batch in zip(prepared_list, epoch()):
        assert all(view.rows is None for view in prepared.item_inputs)
        for view, whole in zip(prepared.item_inputs, resident.views, strict=True):
            assert torch.equal(rows(view), whole[prepared.batch.distinct])
            assert not rows(view)[len(batch.distinct) :].any()


def test_batches_are_padded_and_counted_before():
    batches = epoch()
    for gathered in (table(), PinnedTable(table().views, CPU)):
        prepared_list = list(prepared_batches(iter(batches), gathered, CPU, SHAPE))
        assert {prepared.batch.shape for prepared in prepared_list} == {SHAPE} and len(prepared_list) == 6
        assert [prepared.rows for prepared in prepared_list] == [len(batch.targets) for batch in batches]
        assert [prepared.slots for prepared in prepared_list] == [batch.multiplicity.sum() for batch in batches]
        assert all(
            len(rows(view)) == prepared.batch.shape.distinct
            for prepared in prepared_list
            for view in prepared.item_inputs
        )


# Windows of packed batches


def plan(window_batches: int = 4, first_batches: int = 2) -> RunPlan:
    """Return a plan of six batches of four users an epoch, by default in windows of two and four batches."""
    return dataclasses.replace(
        RunPlan.of(SEQUENCES, 4, seed=0), window_batches=window_batches, first_batches=first_batches
    )


def windows_of(planned: list[PlannedBatch]) -> list[Tensor]:
    return [batch.window for batch in planned if batch.window is not None]


def test_windows_hold_an_epochs_batches_in_order():
    planned = list(planned_batches(plan(), 1, table(), CPU))
    assert [batch.window is not None for batch in planned] == [True, False, True, False, False, False]
    whole = list(planned_batches(plan(6, 6), 1, table(), CPU))
    (window,) = windows_of(whole)
    assert torch.equal(torch.cat(windows_of(planned)), window) and len(window) == 6
    assert [batch[1:] for batch in planned] == [batch[1:] for batch in whole]
    for words, planned_batch, batch in zip(window, whole, epoch(), strict=True):
        packed = StepBatch.of(words, plan().shape)
        assert packed.distinct[: len(batch.distinct)].tolist() == batch.distinct.tolist()
        assert packed.header[HEADER.index("step")] == batch.step
        assert planned_batch[1:] == (None, len(batch.targets), batch.multiplicity.sum())


@pytest.mark.parametrize("taken", [1, 4, 5, 6])
def test_an_epoch_that_goes_on_has_the_windows_that_are_left(taken):
    for source in (table(), PinnedTable(table().views, CPU)):
        whole = list(planned_batches(plan(), 1, source, CPU))
        rest = list(planned_batches(plan(), 1, source, CPU, taken=taken))
        assert [batch[2:] for batch in rest] == [batch[2:] for batch in whole[taken:]]
        words = windows_of(rest) or [torch.empty(0, windows_of(whole)[0].shape[1], dtype=torch.int32)]
        assert torch.equal(torch.cat(words), torch.cat(windows_of(whole))[taken:])


def test_a_window_that_is_done_is_not_kept():
    """For any number of windows, memory holds the current one and, until it is replaced, the one before."""
    seen, alive = [], []
    for planned in planned_batches(plan(1, 1), 1, table(), CPU):
        seen.append(weakref.ref(planned.window))
        alive.append(sum(window() is not None for window in seen))
    assert len(seen) == 6 and max(alive) <= 2


@pytest.mark.parametrize("windows", [(4, 2), (1, 1), (6, 6)])
def test_gathered_rows_come_with_their_batches(windows):
    source = PinnedTable(table().views, CPU)
    planned = list(planned_batches(plan(*windows), 1, source, CPU))
    for planned_batch, batch in zip(planned, epoch(), strict=True):
        states = planned_batch.item_inputs
        assert planned_batch.rows == len(batch.targets) and all(view.rows is None for view in states)
        for view, whole in zip(states, source.views, strict=True):
            assert torch.equal(view.table, whole[batch.distinct])


def test_one_window_and_two_batches_of_rows_are_made_ahead(monkeypatch):
    packed, gathered = [], []

    class Counted(PinnedTable):
        def gather(self, items: Tensor) -> Gathered:
            gathered.append(items)
            return super().gather(items)

    pack = RunPlan.pack
    monkeypatch.setattr(RunPlan, "pack", lambda *args, **kwargs: packed.append(1) or pack(*args, **kwargs))
    stream = planned_batches(plan(3, 3), 1, Counted(table().views, CPU), CPU)
    assert not threads()
    next(stream)
    assert len(packed) == 2
    assert len(gathered) <= 1 + AHEAD and len(threads()) == 2
    stream.close()
    assert not threads() and len(packed) == 2 and len(gathered) == 1 + AHEAD


def test_an_item_that_the_table_lacks_is_found_in_its_window():
    short = FeatureTable(tuple(view[:ITEMS] for view in table().views))
    with pytest.raises(ValueError, match=f"batch.distinct: expected indices from 1 to {ITEMS - 1}, found {ITEMS}"):
        list(planned_batches(plan(), 1, short, CPU))


def test_an_error_of_gathering_comes_out_with_its_batch():
    class Failing(PinnedTable):
        def gather(self, items: Tensor) -> Gathered:
            if torch.equal(items, epoch()[3].distinct):
                raise InputError("the disk is gone")
            return super().gather(items)

    taken = []
    with pytest.raises(InputError, match="the disk is gone"):
        for planned in planned_batches(plan(), 1, Failing(table().views, CPU), CPU):
            taken.append(planned)
    assert len(taken) == 3 and not threads()
