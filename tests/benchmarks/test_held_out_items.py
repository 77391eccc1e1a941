"""The benchmark of added items: what is held out, and that both ways to a catalogue agree."""

from __future__ import annotations

import pytest

from helpers.datasets import histories_in_steps, write_catalogue
from iisan_fast import demo
from iisan_fast.benchmarks.added_items import compare
from iisan_fast.benchmarks.held_out_items import hold_out
from iisan_fast.benchmarks.scientific import PROTOCOL
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError


@pytest.fixture
def dataset(tmp_path):
    """Return a dataset of 36 items, of which the last six are the targets of one user each."""
    histories = histories_in_steps(60, 30)
    for user, item in enumerate(range(31, 37)):
        histories[user][-1] = item
    return write_catalogue(tmp_path / "dataset", histories, 36)


def test_cold_items_and_their_interactions_are_held_out(dataset, tmp_path):
    held = hold_out(dataset, tmp_path, PROTOCOL, 4, seed=0)
    assert held.cold == 6 and len(held.item_ids) == 4 and held.interactions == 4 and held.lost == 0
    whole, rest = (load_dataset(root, PROTOCOL).sequences for root in (dataset, held.rest))
    assert set(held.item_ids) <= {f"i{number}" for number in range(31, 37)}
    assert set(rest.item_ids) == set(whole.item_ids) - set(held.item_ids)
    assert len(rest.items) == len(whole.items) - 4
    assert [line.split("\t")[0] for line in held.file.read_text().splitlines()] == held.item_ids
    with pytest.raises(InputError, match="items: expected at most 6, the cold items"):
        hold_out(dataset, tmp_path, PROTOCOL, 7, seed=0)


@pytest.mark.slow
def test_added_items_are_those_of_a_whole_catalogue(dataset, tmp_path):
    encoder = tmp_path / "text"
    demo.write_text_encoder(encoder, 0)
    changes = {"train.batch_users": 16, "scoring.similarity_dims": 8}
    result = compare(dataset, str(encoder), tmp_path / "work", items=4, epochs=1, **changes)
    assert result["held_out"] == 4 and result["cold"] == 6
    exact, plain, rounded = (result["states"][form] for form in ("float32", "float32_not_standardised", "bfloat16"))
    assert exact["items"] == rounded["items"] == 36 and exact["users"] == 60
    assert max(exact["deviation"].values()) < 1e-4 and exact["equal_top_10"] > 0.9
    assert max(plain["deviation"].values()) < 1e-5 and plain["equal_top_10"] > 0.9
    assert max(rounded["deviation"].values()) < 0.1
    assert exact["standardised"]["largest"] > exact["standardised"]["median"] > 0 and "standardised" not in plain
