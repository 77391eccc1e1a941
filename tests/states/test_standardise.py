"""Check standardised states: plain formulas in float64, the same values in all places, no second table, refusals."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.run_folders import assert_same_run, untimed
from helpers.stores import fill_store, view_description
from helpers.tables import random_table
from iisan_fast.config import ModelConfig, RunConfig, UncachedConfig, ViewConfig
from iisan_fast.errors import InputError
from iisan_fast.models.item_encoders import FrozenItemEncoder
from iisan_fast.states import feature_table
from iisan_fast.states.feature_table import FeatureTable, load_table
from iisan_fast.states.item_source import ItemSource
from iisan_fast.states.standardise import ROWS_AT_ONCE, StateStatistics, state_statistics
from iisan_fast.states.store import Store
from iisan_fast.training.checkpoints import load_checkpoint
from iisan_fast.training.resume_run import resume
from iisan_fast.training.run_changes import RunChanges
from iisan_fast.training.run_folder import RunFolder
from iisan_fast.training.start_run import train

CPU = torch.device("cpu")
ITEMS = ROWS_AT_ONCE + 100
IDS = [f"i{i}" for i in range(1, ITEMS + 1)]
PLACEMENTS = ("device", "pinned", "mapped")

each_placement = pytest.mark.parametrize("placement", PLACEMENTS)


@pytest.fixture
def whole() -> FeatureTable:
    """Return states with large means, small and large deviations, and one number that is the same for all items."""
    table = random_table([(2, 4), (3, 5)], ITEMS, torch.float32)
    for view in table.views:
        view[1:] = view[1:] * torch.logspace(-3, 3, view.shape[2]) + 1000
        view[1:, 0, 2] = 0.1
    return table


@pytest.fixture
def cache(tmp_path, whole) -> Path:
    return fill_store(tmp_path / "cache", IDS, whole, ("a", "b"))


def expected(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Return states [items, K, D] of a dtype, standardised by the plain formula; 0 for a number that hardly varies."""
    values = states.to(dtype).double().numpy()
    mean = values.mean(axis=0)
    deviation = values.std(axis=0)
    varies = (np.ptp(values, axis=0) > 0) & (deviation >= np.abs(mean) / 1024)
    standardised = np.divide(values - mean, deviation, out=np.zeros_like(values), where=varies)
    return torch.from_numpy(standardised)


def read(table: ItemSource, items: list[int]) -> list[Tensor]:
    views = table.read(torch.tensor(items, device=table.index_device))
    return [view.table if view.rows is None else view.table[view.rows] for view in views]


@each_placement
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_have_mean_0_and_deviation_1(cache, whole, placement, dtype):
    table = load_table(cache, ["a", "b"], IDS, CPU, placement, dtype, standardise=True)
    everything = list(range(1, ITEMS + 1))
    for rows, view in zip(read(table, everything), whole.views, strict=True):
        assert rows.dtype == dtype
        torch.testing.assert_close(rows.double(), expected(view[1:], dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert not rows[:, 0, 2].any()
    for rows in read(table, [3, 0, 0]):  # padding stays zeros
        assert rows[0].any() and not rows[1:].any()
    table.close()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_every_place_and_every_part_gives_the_same_bits(cache, dtype, monkeypatch, threads_given_back):
    items = [7, 2, ITEMS, 3, 3, 0]
    results = []
    for placement, at_once, threads in (
        ("device", 4096, 2),
        ("pinned", 100, 1),
        ("mapped", 33, 1),
        ("mapped", 4096, 2),
    ):
        monkeypatch.setattr(feature_table, "ITEMS_AT_ONCE", at_once)
        monkeypatch.setattr("iisan_fast.states.standardise.ROWS_AT_ONCE", at_once // 3)
        torch.set_num_threads(threads)
        table = load_table(cache, ["b", "a"], IDS, CPU, placement, dtype, standardise=True)
        statistics = [table.statistics[name] for name in ("b", "a")]
        results.append([*read(table, items), *(part for view in statistics for part in (view.mean, view.deviation))])
        table.close()
    for result in results[1:]:
        assert all(torch.equal(tensor, first) for tensor, first in zip(result, results[0], strict=True))


def test_the_kept_layers_alone_are_read(cache, whole):
    table = load_table(cache, ["b"], IDS, CPU, "device", layer_groups=1, standardise=True)
    kept_layers = whole.views[1][1:, [0, 2]]
    assert table.shapes == [(2, 5)]
    torch.testing.assert_close(table.views[0][1:].double(), expected(kept_layers, torch.float32), rtol=1e-6, atol=1e-7)


def test_without_standardise_states_stay_as_they_are(cache, whole):
    table = load_table(cache, ["a", "b"], IDS, CPU, "device")
    assert not table.statistics and all(torch.equal(*pair) for pair in zip(table.views, whole.views))


def test_a_large_mean_and_an_outlier_lose_no_digits():
    values = torch.full((1000, 1, 2), 1e6, dtype=torch.float64)
    values[0] = 3e6
    values[1:, 0, 0] += torch.randn(999, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics = state_statistics(values.split(300), torch.float64, "")
    plain = values.numpy()
    np.testing.assert_allclose(statistics.mean, plain.mean(0), rtol=1e-15)
    np.testing.assert_allclose(statistics.deviation, plain.std(0), rtol=1e-12)


def test_a_number_that_varies_less_than_a_thousandth_of_its_mean_gives_0():
    """Such a number holds the rounding of an encoder, which standardising would amplify."""
    values = torch.randn(500, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = -100 + values * torch.tensor([1e-6, 0.09, 0.11], dtype=torch.float64)  # the bound is 100 / 1024
    statistics = state_statistics([values], torch.float64, "")
    assert statistics.deviation[0, :2].tolist() == [0, 0] and 0.1 < statistics.deviation[0, 2] < 0.12
    statistics.standardise(values)
    assert not values[:, 0, :2].any() and abs(values[:, 0, 2].std() - 1) < 0.01


def test_no_second_table_is_allocated():
    """Count the bytes that torch and numpy allocate: parts, not a table."""
    table = torch.randn(12 * ROWS_AT_ONCE, 2, 16)
    statistics = StateStatistics(torch.zeros(2, 16, dtype=torch.float64), torch.ones(2, 16, dtype=torch.float64))
    with torch.profiler.profile(profile_memory=True) as profile:
        statistics.standardise(table)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 3 * ROWS_AT_ONCE * 2 * 16 * 8 < table.nbytes
    tracemalloc.start()
    state_statistics([table], torch.float32, "")
    assert tracemalloc.get_traced_memory()[1] < table.nbytes / 2
    tracemalloc.stop()


@each_placement
def test_states_that_are_not_finite_are_refused(tmp_path, placement):
    states = torch.randn(5, 2, 3)
    states[3, 1, 2] = torch.inf
    with Store(tmp_path / "c", writable=True) as store:
        store.add_views({"v": view_description(2, 3)})
        store.write("v", IDS[:5], [b"d" * 16] * 5, states)
    message = r"c: view 'v': standardise: expected finite states, .* \(kept layer 2, number 3\); extract"
    with pytest.raises(InputError, match=message):
        load_table(tmp_path / "c", ["v"], IDS[:5], CPU, placement, standardise=True)


# Training


def standardised(config: RunConfig, epochs: int, **model) -> RunConfig:
    """Return a configuration with standardised states and a number of epochs."""
    changed = replace(config.model, standardise=True, **model)
    return replace(config, model=changed, train=replace(config.train, max_epochs=epochs))


def test_a_run_is_the_same_in_every_place_and_resumes_exactly(tmp_path, toy_config):
    for placement in PLACEMENTS:
        train(standardised(toy_config, 2), tmp_path / placement, CPU, placement=placement)
    for placement in PLACEMENTS[1:]:
        assert_same_run(tmp_path / placement, tmp_path / "device")
    train(standardised(toy_config, 1), tmp_path / "stopped", CPU)
    resume(tmp_path / "stopped", CPU, placement="mapped", changes=RunChanges(max_epochs=2))
    assert_same_run(tmp_path / "stopped", tmp_path / "device")
    train(replace(toy_config, train=replace(toy_config.train, max_epochs=2)), tmp_path / "plain", CPU)
    assert untimed(tmp_path / "plain") != untimed(tmp_path / "device")


def test_a_run_keeps_the_statistics_of_its_views(tmp_path, toy_config):
    train(standardised(toy_config, 1), tmp_path / "run", CPU)
    stored, _ = load_checkpoint(tmp_path / "run" / "best.safetensors")
    with Store(Path(toy_config.cache)) as store:
        for name in toy_config.views:
            states = torch.empty(
                (len(item_ids(tmp_path / "run")), len(store.view(name)["layers"]), store.view(name)["width"])
            )
            store.read(name, item_ids(tmp_path / "run"), states)
            np.testing.assert_allclose(stored[f"states.mean.{name}"], states.double().numpy().mean(0), atol=1e-12)
            np.testing.assert_allclose(stored[f"states.deviation.{name}"], states.double().numpy().std(0), atol=1e-12)


def item_ids(run: Path) -> list[str]:
    return RunFolder.open(run).sequences.item_ids


def test_frozen_reads_standardised_final_states(cache, whole):
    table = load_table(cache, ["b"], IDS, CPU, "device", standardise=True)
    torch.manual_seed(0)
    encoder = FrozenItemEncoder([5], 4)
    final = expected(whole.views[1][1:, -1:], torch.float32)[:, 0].float()
    torch.testing.assert_close(encoder(table.read(torch.arange(1, ITEMS + 1))), encoder.heads([final]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "id"}, "standardise: id reads no states; leave it out"),
        ({"method": "full"}, "standardise: full trains its encoders, so their states change; leave it out"),
        ({"method": "frozen"}, "standardise: needs the states of all items .* store them with iisan-fast extract"),
    ],
)
def test_runs_without_a_cache_are_refused(change, message):
    views = () if change["method"] == "id" else (ViewConfig("title", "title", "e"),)
    with pytest.raises(InputError, match=message):
        RunConfig("d", uncached=UncachedConfig(views) if views else None, model=ModelConfig(**change, standardise=True))
