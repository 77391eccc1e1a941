"""Trained runs that the tests of serving share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import iisan_fast
from helpers.datasets import histories_at_random, make_sequences, write_dataset_folder
from helpers.stores import fill_store
from helpers.tables import random_table

SMALL = {"epochs": 1, "batch_users": 32, "embedding_dim": 16, "bottleneck": 8, "device": "cpu"}


@pytest.fixture(scope="session")
def shop(tmp_path_factory) -> tuple[Path, Path]:
    """Return (dataset folder, cache of views `image` and `title`): 80 users, 149 items, of which some are cold."""
    root = tmp_path_factory.mktemp("shop")
    sequences = make_sequences(histories_at_random(80, 150), items=150)
    dataset = write_dataset_folder(root / "shop", sequences)
    tables = random_table([(2, 16), (2, 16)], 150, torch.float32)
    return dataset, fill_store(root / "cache", sequences.item_ids, tables, ("image", "title"))


@pytest.fixture(scope="session")
def run_with_terms(shop, tmp_path_factory) -> Path:
    """Return the folder of a run, which no test may change, that is ranked by both terms and a bias of cold items."""
    dataset, cache = shop
    out = tmp_path_factory.mktemp("runs") / "terms"
    iisan_fast.train(dataset, cache, out=out, cooccurrence=2.0, similarity=6.0, cold_bias=-0.5, **SMALL)
    return out


@pytest.fixture(scope="session")
def plain_run(shop, tmp_path_factory) -> Path:
    """Return the folder of a run, which no test may change, that is ranked by its model alone."""
    dataset, cache = shop
    out = tmp_path_factory.mktemp("runs") / "plain"
    iisan_fast.train(dataset, cache, out=out, **SMALL)
    return out


@pytest.fixture(scope="session")
def neighbours_run(shop, tmp_path_factory) -> Path:
    """Return the folder of a run of the method neighbours, which no test may change."""
    dataset, cache = shop
    out = tmp_path_factory.mktemp("runs") / "neighbours"
    iisan_fast.train(dataset, cache, method="neighbours", out=out, device="cpu")
    return out


@pytest.fixture(scope="session")
def exported(run_with_terms, tmp_path_factory) -> Path:
    """Return the folder of an exported run with both terms and an index, which no test may change."""
    from iisan_fast.serving.exports.exporting import export

    folder = tmp_path_factory.mktemp("exported") / "terms"
    export(run_with_terms, folder, index="faiss")
    return folder
