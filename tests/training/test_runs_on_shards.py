"""Check that a run on a cache in shards is the run on one cache, bit for bit, and goes on with the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import iisan_fast
from helpers.run_folders import assert_same_run
from helpers.stores import fill_shards
from helpers.tables import random_table
from iisan_fast.data.sequences import load_dataset
from iisan_fast.errors import InputError
from iisan_fast.states.merging import merge_shards
from iisan_fast.states.shards import Shard
from iisan_fast.states.store import Store
from iisan_fast.training.start_run import train

CPU = torch.device("cpu")


@pytest.mark.parametrize("placement", ["device", "mapped"])
def test_a_run_goes_on_with_shards_or_one_cache_as_if_nothing_had_changed(toy_config, tmp_path, placement):
    item_ids = load_dataset(Path(toy_config.dataset)).sequences.item_ids
    table = random_table([(2, 16), (2, 16)], len(item_ids), torch.float32)
    shards = fill_shards(tmp_path / "shards", item_ids, table, ("image", "title"), 3)
    one, other = tmp_path / "one", tmp_path / "other"
    config = replace(toy_config, train=replace(toy_config.train, max_epochs=1))
    train(config, one, CPU, placement=placement)
    train(replace(config, cache=str(shards)), other, CPU, placement=placement)
    assert_same_run(one, other)
    iisan_fast.resume(one, cache=shards, epochs=2, device="cpu", table=placement)
    merge_shards(shards)
    iisan_fast.resume(other, epochs=2, device="cpu", table=placement)
    assert_same_run(one, other)


def test_a_run_refuses_shards_of_other_content(toy_config, tmp_path):
    item_ids = load_dataset(Path(toy_config.dataset)).sequences.item_ids
    table = random_table([(2, 16), (2, 16)], len(item_ids), torch.float32)
    shards = fill_shards(tmp_path / "shards", item_ids, table, ("image", "title"), 2)
    train(replace(toy_config, cache=str(shards)), tmp_path / "run", CPU)
    shard = next(shard for shard in (Shard(1, 2), Shard(2, 2)) if shard.holds(item_ids[0]))
    with Store(shard.folder(shards), writable=True, shard=shard) as store:
        store.write("image", item_ids[:1], [bytes(16)], torch.zeros(1, 2, 16))
    with pytest.raises(InputError, match="view 'image' has changed since the run began: contents"):
        iisan_fast.resume(tmp_path / "run", epochs=3, device="cpu")
