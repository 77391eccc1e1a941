"""Exports of every kind of model, and of a catalogue that has changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import iisan_fast
from helpers.datasets import histories_at_random, make_sequences, write_dataset_folder
from helpers.stores import view_description
from helpers.tables import random_table
from iisan_fast.errors import InputError
from iisan_fast.serving.exports.exported_encoders import item_encoder_of
from iisan_fast.serving.exports.exporting import export
from iisan_fast.serving.exports.index_files import IndexedVectors, open_index, write_index
from iisan_fast.serving.trained_model import TrainedModel
from iisan_fast.states.entries import content_digest
from iisan_fast.states.store import Store

pytestmark = pytest.mark.slow

SMALL = {"epochs": 1, "batch_users": 32, "embedding_dim": 16, "bottleneck": 8, "device": "cpu"}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text())


@pytest.fixture(scope="module")
def two_widths(tmp_path_factory) -> tuple[Path, Path]:
    """Return a dataset and a cache in bfloat16, whose views differ in width and depth."""
    root = tmp_path_factory.mktemp("widths")
    sequences = make_sequences(histories_at_random(60, 90), items=90)
    dataset = write_dataset_folder(root / "shop", sequences)
    tables = random_table([(3, 16), (4, 24)], 90, torch.float32)
    with Store(root / "cache", writable=True) as store:
        names = ("image", "title")
        store.add_views(
            {name: view_description(*view.shape[1:], dtype="bfloat16") for name, view in zip(names, tables.views)}
        )
        for name, view in zip(names, tables.views):
            digests = [content_digest(f"title of {item_id}".encode()) for item_id in sequences.item_ids]
            store.write(name, sequences.item_ids, digests, view[1:].bfloat16())
    return dataset, root / "cache"


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "iisan", "gates": False, "activation": "gelu"},
        {"method": "iisan", "sanb": "phm", "standardise": True},
        {"method": "iisan", "sanb": "low-rank", "intra": False},
        {"method": "iisan", "inter": False, "item_ids": True},
        {"method": "iisan", "views": ("title",), "similarity": 3.0, "max_inputs": 2},
        {"method": "frozen", "standardise": True, "cooccurrence": 1.0},
    ],
    ids=str,
)
def test_each_kind_of_model_is_exported_with_its_item_encoder(shop, tmp_path, settings):
    sizes = {name: SMALL[name] for name in SMALL if name != "bottleneck" or settings["method"] != "frozen"}
    iisan_fast.train(*shop, out=tmp_path / "run", **{**sizes, **settings})
    report = export(tmp_path / "run", tmp_path / "out", index="usearch")
    assert report.left_out == [] and report.compared.keys() == {"sequence_encoder", "item_encoder"}
    assert report.compared["item_encoder"]["on"].startswith("the cached states of")
    assert report.index.recall > 0.9


@pytest.mark.long
@pytest.mark.parametrize("settings", [{"standardise": True}, {"intra": False}], ids=str)
def test_views_of_two_widths_are_aligned_and_rounded(two_widths, tmp_path, settings):
    iisan_fast.train(*two_widths, method="iisan-versa", out=tmp_path / "run", **SMALL, **settings)
    report = export(tmp_path / "run", tmp_path / "out")
    inputs = manifest_of(tmp_path / "out")["encoders"]["item_encoder"]["inputs"]
    assert inputs == {"states.image": ["items", 3, 16], "states.title": ["items", 4, 24]}
    assert report.compared["item_encoder"]["largest_deviation"]["onnx"] <= 1e-5


@pytest.mark.parametrize("cache_is_there", [True, False])
def test_an_item_encoder_is_compared_on_random_states_without_a_cache(plain_run, tmp_path, monkeypatch, cache_is_there):
    model = TrainedModel.load(plain_run, torch.device("cpu"))
    if not cache_is_there:
        config = model.config
        object.__setattr__(config, "cache", str(tmp_path / "gone"))
    encoder = item_encoder_of(model)
    assert encoder.compared.startswith("the cached states of" if cache_is_there else "random states of 256 items")
    inputs, (vectors,) = next(iter(encoder.cases))
    plain = encoder.portable.module(*inputs)
    torch.testing.assert_close(plain, vectors, rtol=0, atol=1e-5 * float(vectors.abs().max()))
    if cache_is_there:
        torch.testing.assert_close(vectors, model.catalogue.vectors, rtol=0, atol=1e-5 * float(vectors.abs().max()))


@pytest.mark.long
def test_a_run_without_training_has_no_item_encoder(neighbours_run, tmp_path):
    report = export(neighbours_run, tmp_path / "out", index="faiss")
    assert report.left_out == ["item_encoder: the method neighbours has no item encoder"]
    assert report.compared.keys() == {"sequence_encoder"} and report.index.recall == 1


@pytest.mark.long
def test_a_run_of_item_numbers_has_no_item_encoder(shop, tmp_path):
    sizes = {name: value for name, value in SMALL.items() if name != "bottleneck"}
    iisan_fast.train(shop[0], method="id", out=tmp_path / "run", **sizes)
    report = export(tmp_path / "run", tmp_path / "out")
    assert len(report.left_out) == 1 and "reads no contents" in report.left_out[0]


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
def test_removed_items_are_inputs_but_not_in_the_index(run_with_terms, tmp_path, kind):
    model = TrainedModel.load(run_with_terms, torch.device("cpu"))
    removed = np.zeros(len(model.catalogue.item_ids), dtype=bool)
    removed[[0, 5, 7]] = True
    rows = np.flatnonzero(~removed)
    indexed = IndexedVectors(rows, np.ascontiguousarray(model.joined.numpy()[rows]))
    write_index(kind, indexed, tmp_path)
    search = open_index(kind, indexed, tmp_path)
    candidates = search(model.joined.numpy()[:3], 200)
    assert not set(candidates.ravel().tolist()) & {0, 5, 7}
    assert set(candidates[0].tolist()) >= set(rows.tolist()) and (candidates[:, len(rows) :] == -1).all()


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
@pytest.mark.parametrize(
    ("part", "message"), [(np.s_[:-1], "expected 19 items of dimension 8, found 20"), (np.s_[:, :4], "dimension 4")]
)
def test_an_index_of_other_vectors_is_refused(tmp_path, kind, part, message):
    vectors = np.random.default_rng(0).standard_normal((20, 8), dtype=np.float32)
    write_index(kind, IndexedVectors(np.arange(20), vectors), tmp_path)
    other = np.ascontiguousarray(vectors[part])
    with pytest.raises(InputError, match=message):
        open_index(kind, IndexedVectors(np.arange(len(other)), other), tmp_path)


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
@pytest.mark.parametrize(("content", "message"), [(None, "no such index"), (b"damaged", "damaged, or no index")])
def test_a_damaged_index_is_one_line(tmp_path, kind, content, message):
    if content is not None:
        (tmp_path / f"index.{kind}").write_bytes(content)
    vectors = np.ones((2, 4), dtype=np.float32)
    with pytest.raises(InputError, match=message) as error:
        open_index(kind, IndexedVectors(np.arange(2), vectors), tmp_path)
    assert "\n" not in str(error.value)
