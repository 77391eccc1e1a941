"""Train on ready-made features: the same run as on a cache of these states, and what a run on features refuses."""

# ruff: noqa: E402 - what needs polars is imported once it is known to be there

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pl = pytest.importorskip("polars")

from helpers.command_line import iisan_fast, refused
from helpers.datasets import histories_in_steps, make_sequences, write_dataset_folder
from helpers.run_folders import assert_same_run
from helpers.stores import fill_store
from helpers.tables import random_table
from iisan_fast import IISAN, api
from iisan_fast.config import FeaturesConfig, ModelConfig, RunConfig, UncachedConfig, ViewConfig
from iisan_fast.errors import InputError
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


def test_views_without_an_order_take_the_cache_first(catalogue, tmp_path):
    cache = fill_store(tmp_path / "one", catalogue.item_ids, random_table([(3, 8)], 24, torch.float32), ("a",))
    plan = api.train(catalogue.dataset, cache, views=catalogue.features("x"), dry_run=True, **SMALL)
    assert list(plan["views"]) == ["a", "x"] and str(catalogue.root / "x.npy") in plan["files"]["read"]
    assert plan["views"]["x"] == {
        **{"source": "features", "path": str(catalogue.root / "x.npy"), "pooling": None},
        **{"layers": [0, 1, 2], "width": 8},
    }


# The command line, on a dataset whose ids are whole numbers


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """Return a folder as MMRec publishes one: ids from 0, image_feat.npy and text_feat.npy of other widths."""
    root = tmp_path_factory.mktemp("numbered")
    sequences = make_sequences(histories_in_steps(60, 24))
    write_dataset_folder(root / "dataset", replace(sequences, item_ids=[str(number) for number in range(24)]))
    generator = np.random.default_rng(0)
    np.save(root / "image_feat.npy", generator.normal(size=(24, 12)))
    np.save(root / "text_feat.npy", generator.normal(size=(24, 6)).astype(np.float32))
    return root


@pytest.fixture(scope="module")
def numbered_run(numbered) -> Path:
    """Return a run on these files, trained by the command line."""
    views = [f"source=features path={numbered / name}_feat.npy name={name}" for name in ("image", "text")]
    result = iisan_fast(
        *("train", numbered / "dataset", "--view", views[0], "--view", views[1], "--method", "iisan-versa"),
        *("--epochs", 1, "--embedding-dim", 8, "--bottleneck", 4, "--similarity", 2, "--device", "cpu"),
        *("--out", numbered / "run", "--json"),
    )
    assert result.returncode == 0 and json.loads(result.stdout)["best_epoch"] == 1, result.stderr
    return numbered / "run"


def test_the_run_records_file_shape_and_digest(numbered, numbered_run):
    views = RunFolder.open(numbered_run).views
    assert list(views) == ["image", "text"]
    stored = np.load(numbered / "image_feat.npy").astype(np.float32)
    assert views["image"] == {
        **{"source": "features", "path": str(numbered / "image_feat.npy"), "shape": [24, 1, 12], "first_id": 0},
        **{"layers": [0], "depth": 1, "width": 12, "dtype": "float32"},
        "contents": hashlib.sha256(stored.tobytes()).hexdigest(),
    }


def test_recommend_similar_and_show_work(numbered_run, tmp_path):
    model = IISAN.load(numbered_run, "cpu")
    assert len(model.recommend([["0", "3", "6"]], 3)[0]) == 3
    assert len(model.similar("0", 5, by="content")) == 5
    result = iisan_fast("show", numbered_run, "--out", tmp_path / "page.html", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "none: image_feat.npy" in (tmp_path / "page.html").read_text()


def test_a_published_run_has_names_in_place_of_paths(numbered, numbered_run, tmp_path):
    model = IISAN.load(numbered_run, "cpu")
    model.save_pretrained(tmp_path / "published", include_titles=True)
    for file in (tmp_path / "published").iterdir():
        assert str(numbered).encode() not in file.read_bytes(), file.name
    published = IISAN.load(tmp_path / "published", "cpu")
    assert published.recommend([["0", "3"]], 3) == model.recommend([["0", "3"]], 3)
    assert "| image | features | none: `image_feat.npy` |" in (tmp_path / "published" / "README.md").read_text()


def test_a_changed_file_is_found_by_verify_and_resume(numbered, numbered_run, tmp_path):
    assert api.verify(numbered_run).damage == []
    run = shutil.copytree(numbered_run, tmp_path / "run")
    moved = tmp_path / "moved.npy"
    values = np.load(numbered / "image_feat.npy")
    np.save(moved, values)
    result = api.resume(run, features={"image": moved}, epochs=2, device="cpu")
    assert result["epochs"] == 2 and RunFolder.open(run).config.features[0].path == str(moved)
    values[3] += 1
    np.save(moved, values)
    (damage,) = api.verify(run).damage
    assert damage.where == str(moved) and "view 'image' have changed since the run began" in damage.problem
    with pytest.raises(InputError, match="view 'image' has changed since the run began: contents"):
        api.resume(run, epochs=3, device="cpu")
    with pytest.raises(InputError, match="features: the run reads no features 'audio'; expected image, text"):
        api.resume(run, features={"audio": moved}, device="cpu")
    np.save(moved, values[:20])
    assert "lacks 4 of 24 items (20, 21, 22 and 1 more)" in refused("train", "--resume", run, "--epochs", 3)


def test_new_items_bring_their_features(numbered, numbered_run, tmp_path):
    run = shutil.copytree(numbered_run, tmp_path / "run")
    items = tmp_path / "new.tsv"
    items.write_text("24\ta title\n25\tanother\n")
    image, text = (np.load(numbered / f"{name}_feat.npy") for name in ("image", "text"))
    np.save(tmp_path / "image.npy", np.concatenate([image, image[[7, 3]]]))
    pl.DataFrame({"item_id": ["25", "24"], "emb": text[[3, 7]].tolist()}).write_parquet(tmp_path / "text.parquet")
    features = ("--features", f"image={tmp_path / 'image.npy'}", "--features", f"text={tmp_path / 'text.parquet'}")
    result = iisan_fast("add-items", run, items, *features, "--device", "cpu", "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["added"] == 2, result.stderr
    catalogue = IISAN.load(run, "cpu").trained.catalogue
    assert torch.allclose(catalogue.vectors[24:], catalogue.vectors[[7, 3]], atol=1e-6)
    assert torch.allclose(catalogue.coordinates[24:], catalogue.coordinates[[7, 3]], atol=1e-6)


@pytest.mark.parametrize(
    ("features", "problem"),
    [
        ([], "reads ready-made features as view 'image'; give those of the items by --features image=FILE"),
        (["image=i.npy", "text=i.npy", "audio=i.npy"], "the run reads no features 'audio'; expected image, text"),
        (["image=narrow.npy", "text=narrow.npy"], "width: expected 12, as view 'image' of the run, found 6"),
        (["image=short.npy", "text=short.npy"], "view 'image' lacks 1 of 1 items (24)"),
        (["image"], "--features: expected VIEW=FILE, found 'image'"),
        (["image=a", "image=b"], "view 'image' has two files, a and b"),
    ],
)
def test_features_that_new_items_cannot_have(numbered, numbered_run, tmp_path, monkeypatch, features, problem):
    monkeypatch.chdir(tmp_path)
    Path("new.tsv").write_text("24\ta title\n")
    np.save("narrow.npy", np.zeros((25, 6)))
    np.save("short.npy", np.zeros((24, 12)))
    options = [word for text in features for word in ("--features", text)]
    assert problem in refused("add-items", numbered_run, "new.tsv", *options, "--device", "cpu")


def test_new_items_in_the_order_of_the_rows_for_a_run_with_a_file_of_ids(catalogue, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for name in "xy":
        np.save(tmp_path / f"{name}.npy", np.load(catalogue.root / f"{name}.npy")[[4, 2]])
    features = {name: tmp_path / f"{name}.npy" for name in "xy"}
    model = IISAN.load(copy, "cpu")
    model.add_items([{"item_id": f"new{n}", "title": "a title"} for n in (1, 2)], features=features)
    vectors = model.trained.catalogue.vectors
    assert torch.allclose(vectors[24:], vectors[[4, 2]], atol=1e-6)
    with pytest.raises(InputError, match="expected a row for each of 1 items, in their order, found 2"):
        model.add_items([{"item_id": "new3", "title": "a title"}], features=features)


@pytest.mark.slow
def test_the_item_encoder_is_exported_and_compared_on_the_features(numbered_run, tmp_path):
    pytest.importorskip("onnxruntime")
    result = iisan_fast("export", numbered_run, "--to", tmp_path / "exported", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["compared"]["item_encoder"]["on"] == "the stored states of 24 items"


def test_a_settings_file_names_features_among_its_views(numbered, tmp_path, monkeypatch):
    monkeypatch.chdir(numbered)
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "encoders:\n"
        "  - {source: features, path: text_feat.npy, name: text}\n"
        "  - {source: features, path: image_feat.npy}\n"
        "model: {method: iisan-versa, embedding_dim: 8, bottleneck: 4}\n"
    )
    changes = {"features.text.first_id": 0}
    plan = api.train("dataset", config=settings, changes=changes, dry_run=True, device="cpu")
    assert list(plan["views"]) == ["text", "image_feat"]
    assert [view["first_id"] for view in plan["config"]["features"]] == [0, None]
    assert plan["config"]["features"][1]["path"] == str(numbered / "image_feat.npy")
    again = tmp_path / "config.json"
    again.write_text(json.dumps(plan["config"]))
    assert api.train(config=again, dry_run=True, device="cpu")["views"] == plan["views"]
    assert "there is nothing to extract; give them to train" in refused(
        "extract", "dataset", "--cache", tmp_path / "c", "--config", settings
    )


def test_the_class_trains_on_features(numbered, tmp_path):
    features = {name: numbered / f"{name}_feat.npy" for name in ("image", "text")}
    model = IISAN(features=features, device="cpu", embedding_dim=8, bottleneck=4, epochs=1)
    model.fit(numbered / "dataset", tmp_path / "run")
    config = RunFolder.open(tmp_path / "run").config
    assert config.model.method == "iisan-versa" and config.views == ("image", "text")
    with pytest.raises(InputError, match="features: expected files by the names of their views"):
        IISAN(features=["image_feat.npy"])


def test_neighbours_compare_features(numbered, tmp_path):
    views = FeaturesConfig("image", str(numbered / "image_feat.npy"))
    result = api.train(numbered / "dataset", views=views, method="neighbours", out=tmp_path / "run", device="cpu")
    assert result["neighbours"]["similarity"] and result["scoring"]["similarity"] == 9


# What is refused


X = FeaturesConfig("x", "f.npy")
TITLE = ViewConfig("title", "title", "encoder")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"model": ModelConfig("lora")}, "method: lora trains encoders, and features are ready-made"),
        ({"model": ModelConfig("id")}, "features: id reads no states; leave them out"),
        ({"uncached": UncachedConfig((TITLE,))}, "cannot stand beside encoders that run"),
        ({"features": (X, X)}, "features: two have one name (x, x)"),
        ({"views": ("x", "title")}, "views: title would be read from a cache; give the cache, or leave it out"),
        ({"cache": "c"}, "cache: no view of it is read"),
        ({"cache": "c", "views": ("a", "b")}, "views: iisan takes 1 or 2, found 3"),
    ],
)
def test_settings_that_features_exclude(settings, problem):
    with pytest.raises(InputError) as caught:
        RunConfig(**{"dataset": "d", "features": (X,), **settings})
    assert problem in str(caught.value)


def test_what_the_command_line_refuses(catalogue, numbered, tmp_path):
    view = f"source=features path={numbered / 'image_feat.npy'} name=image"
    start = ("train", numbered / "dataset", "--view", view, "--out", tmp_path / "run")
    assert "cannot stand beside encoders that run" in refused(*start, "--text-encoder", "bert-base-uncased")
    assert "layer_groups: 1 groups need 2 layers or more" in refused(*start, "--layer-groups", 1)
    other = f"source=features path={numbered / 'text_feat.npy'}"
    assert "method: iisan needs views of equal shape" in refused(*start, "--view", other)
    assert "--features: is for --resume" in refused(*start, "--features", "image=f")
    assert "layers: unknown" not in refused(*start, "--set", "features.image.layers=[1]")
    assert "pooling: unknown setting" in refused("train", "--view", f"{view} pooling=mean")
    assert "features are ready-made; give them to train" in refused(
        "extract", numbered / "dataset", "--cache", tmp_path / "c", "--view", view
    )
    line = refused("train", catalogue.dataset, "--cache", catalogue.cache, "--view", view)
    assert "holds 2 views (a, b) beside the features, and a run reads two; choose one of them as views" in line
    twice = f"source=features path={catalogue.root / 'x.npy'} ids={catalogue.root / 'ids.txt'} name=a"
    line = refused("train", catalogue.dataset, "--cache", catalogue.cache, "--views", "b", "--view", twice)
    assert "has a view 'a' too; give the features another name" in line
    assert not (tmp_path / "run").exists()


def test_views_name_the_order_of_a_cache_and_features(catalogue):
    view = f"source=features path={catalogue.root / 'x.npy'} ids={catalogue.root / 'ids.txt'} name=x"
    start = ("train", catalogue.dataset, "--cache", catalogue.cache, "--view", view, "--dry-run", "--json")
    for names, order in (("b", ["b", "x"]), ("x,b", ["x", "b"])):
        result = iisan_fast(*start, "--views", names)
        assert list(json.loads(result.stdout)["views"]) == order
