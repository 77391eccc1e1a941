"""Export of a run: what the folder holds, that it gives the run's scores, and what is refused."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from scipy.sparse import load_npz

from iisan_fast.errors import InputError
from iisan_fast.serving.exports import exporting, index_files
from iisan_fast.serving.exports.exported_encoders import sequence_encoder_of
from iisan_fast.serving.exports.exporting import export
from iisan_fast.serving.exports.index_recall import recall_of_index
from iisan_fast.serving.exports.module_files import WrittenModule
from iisan_fast.serving.histories.user_histories import UserHistories
from iisan_fast.serving.recommendation import recommend
from iisan_fast.serving.trained_model import TrainedModel

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(exported) -> dict:
    return json.loads((exported / "export.json").read_text())


def test_the_manifest_has_the_size_and_digest_of_every_file(exported, manifest):
    contents = {path.name: path.read_bytes() for path in exported.iterdir() if path.name != "export.json"}
    assert manifest["bytes"] == {name: len(content) for name, content in contents.items()}
    assert manifest["sha256"] == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def test_the_tables_are_those_of_the_run(exported, manifest, run_with_terms):
    import polars

    model = TrainedModel.load(run_with_terms, CPU)
    joined = np.load(exported / "item_vectors.npy")
    assert joined.dtype == np.float32 and manifest["columns"] == {"model": 16, "is_cold": 1, "coordinates": 32}
    vectors, is_cold, coordinates = joined[:, :16], joined[:, 16], joined[:, 17:]
    np.testing.assert_array_equal(vectors, model.catalogue.vectors.numpy())
    np.testing.assert_array_equal(is_cold, model.catalogue.training_counts[1:] == 0)
    np.testing.assert_array_equal(coordinates, model.catalogue.coordinates.numpy())
    rows = [json.loads(line) for line in (exported / "items.jsonl").read_text().splitlines()]
    assert [row["item_id"] for row in rows] == model.catalogue.item_ids
    assert [row["title"] for row in rows] == model.catalogue.titles
    assert [row["training_count"] for row in rows] == model.catalogue.training_counts[1:].tolist()
    table = polars.read_parquet(exported / "items.parquet")
    assert table["item_id"].to_list() == model.catalogue.item_ids
    np.testing.assert_array_equal(table["vector"].to_numpy(), vectors)
    matrix = load_npz(exported / "cooccurrence.npz")
    np.testing.assert_array_equal(matrix.data, model.cooccurrence.values)
    assert manifest["weights"] == {"cooccurrence": 2.0, "similarity": 6.0, "cold_bias": -0.5}


def test_each_encoder_was_run_and_agrees(manifest):
    assert manifest["compared"].keys() == {"sequence_encoder", "item_encoder"}
    for compared in manifest["compared"].values():
        assert compared["largest_deviation"].keys() == {"onnx", "pt2"}
        assert 0 < max(compared["largest_deviation"].values()) <= 1e-5


def test_the_recall_of_the_index_is_measured(manifest):
    index = manifest["index"]
    assert (index["items"], index["dimension"]) == (manifest["available"], 16 + 1 + 32)
    assert index["measured"]["users"] == 80 and 0.9 < index["measured"]["recall"] <= 1


def test_the_recall_is_the_share_of_the_best_items_among_the_candidates(plain_run):
    model = TrainedModel.load(plain_run, CPU)  # without co-occurrence: the candidates are those of the index alone
    histories = UserHistories.of_run(plain_run).part(0, 40)
    order = np.argsort(-model.scores(histories).queries.numpy() @ model.joined.numpy().T, axis=1)
    asked = []

    def search(_queries: np.ndarray, count: int) -> np.ndarray:
        asked.append(count)
        return order[:, :count]

    assert recall_of_index(model, histories, search).recall == 1
    assert asked == [100 + histories.lengths.max()]
    best = np.concatenate([result.items for result in recommend(model, histories, 10)]) - 1
    order = np.where(np.arange(100)[None] < 4, np.pad(best[:, :4], ((0, 0), (0, 96))), -1)
    assert recall_of_index(model, histories, search).recall == pytest.approx(0.4)


def test_a_folder_that_exists_is_refused_and_stays(run_with_terms, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="exists already"):
        export(run_with_terms, tmp_path / "taken")
    assert list((tmp_path / "taken").iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "index", "remedy"),
    [("onnxscript", None, "[export]"), ("faiss", "faiss", "[faiss]"), ("usearch", "usearch", "[usearch]")],
)
def test_a_missing_library_names_the_command_that_installs_it(monkeypatch, tmp_path, missing, index, remedy):
    for module in (exporting, index_files):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(InputError) as error:
        export(tmp_path / "run", tmp_path / "out", index)
    assert f"pip install 'iisan-fast{remedy}'" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_deviation_is_an_error(exported, run_with_terms):
    encoder = sequence_encoder_of(TrainedModel.load(run_with_terms, CPU))
    written = WrittenModule(encoder.portable, exported)
    (inputs, (states, queries)), _ = encoder.cases
    changed = states.clone()
    changed[5, 3] += 3e-5 * states.abs().max()
    with pytest.raises(InputError, match=r"sequence_encoder.onnx: expected .* found a deviation of 3e-05"):
        written.deviations([(inputs, (changed, queries))])
    with pytest.raises(InputError, match="found a deviation of nan"):
        written.deviations([(inputs, (states, queries * torch.nan))])


def test_an_export_that_fails_leaves_nothing(monkeypatch, run_with_terms, tmp_path):
    def fail(*_arguments):
        raise InputError("no room")

    monkeypatch.setattr(exporting, "write_module", fail)
    with pytest.raises(InputError, match="no room"):
        export(run_with_terms, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
