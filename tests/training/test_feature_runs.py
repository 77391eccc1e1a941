"""Train on ready-made features: the same run as on a cache of these states, and what a run on features refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from helpers.datasets import histories_in_steps, make_sequences, write_dataset_folder
from helpers.run_folders import assert_same_run
from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast import api
from iisan_fast.config import FeaturesConfig
from iisan_fast.training.run_folder import RunFolder

CPU = torch.device("cpu")
SMALL = {"embedding_dim": 8, "bottleneck": 4, "epochs": 2, "batch_users": 20, "device": "cpu"}
FROZEN = {**SMALL, "method": "frozen"}
del FROZEN["bottleneck"]


class Catalogue(NamedTuple):
    """A small dataset, a cache of its states in two views, and the same states as files of features."""

    root: Path
    dataset: Path
    cache: Path
    item_ids: list[str]

    def features(self, name: str, **settings: Any) -> FeaturesConfig:
        """Return the view of a file of features with the ids beside it."""
        return FeaturesConfig(name, str(self.root / f"{name}.npy"), **{"ids": str(self.root / "ids.txt"), **settings})


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory) -> Catalogue:
    """Return a catalogue whose cache has the views a and b, and whose files have the features x (of a) and y (of b)."""
    root = tmp_path_factory.mktemp("catalogue")
    sequences = make_sequences(histories_in_steps(60, 24))
    table = random_table([(3, 8), (3, 8)], 24, torch.float32)
    for name, view in zip("xy", table.views):
        np.save(root / f"{name}.npy", view[1:].numpy())
    (root / "ids.txt").write_text("".join(f"{item_id}\n" for item_id in sequences.item_ids))
    dataset = write_dataset_folder(root / "dataset", sequences)
    cache = fill_store(root / "cache", sequences.item_ids, table, ("a", "b"))
    return Catalogue(root, dataset, cache, sequences.item_ids)


@pytest.fixture(scope="module")
def cached(catalogue) -> Path:
    """Return a run on the cache."""
    api.train(catalogue.dataset, catalogue.cache, views=["a", "b"], out=catalogue.root / "cached", **SMALL)
    return catalogue.root / "cached"


@pytest.fixture(scope="module")
def run(catalogue) -> Path:
    """Return a run on features alone."""
    views = [catalogue.features("x"), catalogue.features("y")]
    api.train(catalogue.dataset, views=views, out=catalogue.root / "run", **SMALL)
    return catalogue.root / "run"


def test_features_give_the_losses_and_weights_of_a_cache_bit_for_bit(cached, run):
    assert_same_run(cached, run)


def test_a_cache_beside_features_gives_them_too_in_the_named_order(catalogue, cached, tmp_path):
    views = [catalogue.features("x"), "b"]
    api.train(catalogue.dataset, catalogue.cache, views=views, out=tmp_path / "run", **SMALL)
    assert_same_run(cached, tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").config.views == ("x", "b")


@pytest.mark.parametrize("table", ["pinned", "mapped"])
def test_standardised_features_in_any_place_are_those_of_the_cache(catalogue, tmp_path, table):
    options = {**SMALL, "epochs": 1, "standardise": True, "table": table, "similarity": 2.0}
    api.train(catalogue.dataset, catalogue.cache, views="a", out=tmp_path / "cached", **options)
    api.train(catalogue.dataset, views=catalogue.features("x"), out=tmp_path / "run", **options)
    assert_same_features(tmp_path / "cached", tmp_path / "run", ("a", "x"))


def assert_same_features(cached: Path, run: Path, names: tuple[str, str]) -> None:
    """Assert that two runs have the same figures and tensors, whose names have their views' names."""
    before, now = (json.loads((folder / "test.json").read_text()) for folder in (cached, run))
    assert before == now
    tensors, others = (RunFolder.open(folder).load_best()[0] for folder in (cached, run))
    renamed = {name.replace(f".{names[0]}", f".{names[1]}") if "states" in name else name for name in tensors}
    assert renamed == set(others)
    assert all(torch.equal(tensors[name], others[other]) for name, other in zip(sorted(tensors), sorted(others)))


def test_frozen_reads_the_last_of_the_layers_that_are_named(catalogue, tmp_path):
    last = np.load(catalogue.root / "x.npy")[:, 1]
    np.save(tmp_path / "last.npy", last)
    ids = str(catalogue.root / "ids.txt")
    options = {**FROZEN, "epochs": 1}
    api.train(catalogue.dataset, views=catalogue.features("x", layers=(0, 1)), out=tmp_path / "all", **options)
    views = FeaturesConfig("x", str(tmp_path / "last.npy"), ids=ids)
    api.train(catalogue.dataset, views=views, out=tmp_path / "last", **options)
    assert_same_run(tmp_path / "all", tmp_path / "last")
