"""The committed recipes: extraction and training run them unchanged, and the list of them is whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import iisan_fast
from helpers.document_folder import fill_folder
from iisan_fast.config import RunConfig, ViewConfig
from iisan_fast.errors import InputError
from iisan_fast.models.side_network import SideNetwork
from iisan_fast.setting_fields import from_dict
from iisan_fast.setting_sources import base_settings
from iisan_fast.settings import extraction_config
from iisan_fast.settings_files import read_settings

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
STRONG = FOLDER / "strong.yaml"  # for any dataset
OF_A_DATASET = [recipe for recipe in RECIPES if recipe != STRONG]
VIT, BERT, MINILM = "google/vit-base-patch16-224", "bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2"
LLAMA_LAYERS = (0, 5, 20, 35, 50, 65, 80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a working folder with DATASET, recipes/ and small encoders under their hub names."""
    folder = tmp_path_factory.mktemp("recipes") / "folder"
    fill_folder(folder)
    return folder


@pytest.mark.parametrize("recipe", OF_A_DATASET, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_a_configuration(recipe):
    values = base_settings(recipe)
    views = [view["name"] for view in values.pop("encoders")]
    config = from_dict(RunConfig, {"dataset": "d", "views": views, **values})
    assert Path(config.cache) == Path("states", recipe.stem).resolve()
    network = SideNetwork([(7, 24), (7, 24 if config.model.method == "iisan" else 48)], config.model)
    widths = {name: getattr(network, name).down_bias.shape[1] for name in network.towers}
    image = 512 if recipe.stem == "microlens-100k-versa" else 64
    assert widths == {"first": image, "second": 64, "inter": 64}
    assert config.train.batch_users == (512 if recipe.stem == "microlens-100k-versa" else 64)
    rates = {"adapters": 1e-4, "gates": 2e-4, "heads": 2e-4, "sequence_encoder": 2e-4}
    assert config.train.learning_rates == rates and config.model.embedding_dim == 64 and config.model.dropout == 0.1


@pytest.mark.parametrize("recipe", OF_A_DATASET, ids=lambda recipe: recipe.stem)
def test_extraction_takes_the_encoders_of_a_recipe(recipe):
    plan = extraction_config({"dataset": "d"}, base_settings(recipe))
    assert plan.cache == Path("states", recipe.stem).resolve()
    sources = ("title", "title") if recipe.stem == "scientific-minilm" else ("image", "title")
    assert tuple(view.source for view in plan.views) == sources
    if recipe.stem == "scientific-minilm":
        options = {"layers": (0, 2, 4, 6), "max_tokens": 64, "encoder_dtype": "bfloat16"}
        poolings = ("cls", "mean")
        assert plan.views == [ViewConfig(f"title-{name}", "title", MINILM, name, **options) for name in poolings]
        assert plan.protocol.unescape_titles is False
    elif plan.views[1].encoder == BERT:
        assert plan.views == [ViewConfig("image", "image", VIT), ViewConfig("title", "title", BERT)]
    else:
        assert plan.views[1].layers == LLAMA_LAYERS and plan.views[1].options == {"device_map": "auto"}


def test_the_recipe_for_any_dataset_has_nothing_of_one():
    values = base_settings(STRONG)
    assert values.keys() == {"model", "train", "scoring"}
    config = from_dict(RunConfig, {"dataset": "d", "cache": "c", "views": ["any"], **values})
    assert config.train.seed == 0 and config.scoring.cooccurrence > 0 and config.scoring.similarity > 0


def test_a_recipe_that_was_run_has_the_settings_of_its_results():
    recipe = base_settings(FOLDER / "scientific-minilm.yaml")
    results = FOLDER.parent / "benchmarks" / "results"
    run = read_settings(results / "scientific-titles-64-tokens.config.json")
    run["train"]["max_epochs"] = recipe["train"]["max_epochs"]  # 40 at first, then on to the early stop
    assert [view["name"] for view in recipe["encoders"]] == run["views"]
    for section in ("protocol", "model", "train"):
        assert recipe[section].items() <= run[section].items()


def test_every_recipe_is_listed_with_whether_it_was_run():
    lines = (FOLDER / "README.md").read_text().splitlines()
    for recipe in RECIPES:
        (line,) = [line for line in lines if line.startswith("|") and f"`{recipe.stem}`" in line]
        assert line.endswith("| not run |") or "benchmarks/results/" in line
    listed = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert sorted(listed) == [recipe.stem for recipe in RECIPES]


@pytest.mark.slow
def test_extract_and_train_run_a_recipe_unchanged(folder, monkeypatch):
    monkeypatch.chdir(folder)
    recipe = "recipes/instruments-iisan.yaml"
    results = iisan_fast.extract("DATASET", config=recipe, device="cpu")
    assert [one.view for one in results] == ["image", "title"]
    assert all(one.encoded == one.items > 0 for one in results)
    assert sorted(os.listdir("states/instruments-iisan")) == ["lock", "manifest.json", "states.lmdb"]
    small = {"epochs": 1, "embedding_dim": 16, "bottleneck": 8, "device": "cpu"}
    cached = iisan_fast.train("DATASET", config=recipe, out="runs/cached", **small)
    running = iisan_fast.train("DATASET", config=recipe, uncached=True, out="runs/uncached", **small)
    saved = [read_settings(Path("runs", name, "config.json")) for name in ("cached", "uncached")]
    assert [values["views"] for values in saved] == [["image", "title"]] * 2
    assert saved[0]["uncached"] is None and saved[1]["cache"] is None
    assert [view["encoder"] for view in saved[1]["uncached"]["views"]] == [VIT, BERT]
    assert cached["epochs"] == running["epochs"] == 1
    plan = iisan_fast.train("DATASET", config="runs/uncached/config.json", out="runs/again", dry_run=True)
    assert plan["config"] == {name: value for name, value in saved[1].items() if name != "format"}


@pytest.mark.slow
def test_the_recipe_for_any_dataset_trains(toy_run, tmp_path):
    dataset, cache = toy_run
    result = iisan_fast.train(dataset, cache, config=STRONG, epochs=1, out=tmp_path / "run", device="cpu")
    values = base_settings(STRONG)
    assert result["method"] == values["model"]["method"]
    assert result["scoring"] == {name: values["scoring"][name] for name in ("cooccurrence", "similarity", "cold_bias")}


@pytest.mark.slow
def test_a_cache_of_other_settings_than_the_recipe_is_refused(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    recipe = "recipes/scientific-minilm.yaml"
    cache = tmp_path / "states"
    iisan_fast.extract("DATASET", cache, config=recipe, device="cpu")
    for name, value, message in (
        ("encoders.title-cls.max_tokens", 30, "view 'title-cls' .*: max_tokens 64 there, 30 now"),
        ("encoders.title-mean.layers", [0, 6], r"view 'title-mean' .*: layers \[0, 2, 4, 6\] there, \[0, 6\] now"),
        ("encoders.title-mean.pooling", "cls", 'pooling "mean" there, "cls" now'),
        ("encoders.title-cls.encoder", BERT, f"encoder {MINILM} there, {BERT} now"),
        ("encoders.title-cls.encoder_dtype", "float32", 'encoder_dtype "bfloat16" there, "float32" now'),
    ):
        with pytest.raises(InputError, match=message) as error:
            iisan_fast.train("DATASET", cache, config=recipe, changes={name: value}, dry_run=True)
        assert "\n" not in str(error.value)
    moved = tmp_path / "moved"
    moved.symlink_to(Path(MINILM).resolve())
    changes = {"encoders.title-cls.encoder": str(moved), "encoders.title-mean.encoder_dtype": "auto"}
    assert iisan_fast.train("DATASET", cache, config=recipe, changes=changes, dry_run=True)["method"] == "iisan-versa"


@pytest.mark.slow
def test_a_recipe_serves_every_method(folder, monkeypatch, tmp_path):
    """Use a recipe for tuning and for id: tuning ignores the cache's layers and dtype, id reads no encoder."""
    monkeypatch.chdir(folder)
    recipe = "recipes/scientific-minilm.yaml"
    bitfit = iisan_fast.train("DATASET", config=recipe, method="bitfit", out=tmp_path / "run", dry_run=True)
    views = bitfit["config"]["uncached"]["views"]
    assert [(view["layers"], view["encoder_dtype"]) for view in views] == [(None, "auto")] * 2
    numbers = iisan_fast.train("DATASET", config=recipe, method="id", out=tmp_path / "run", dry_run=True)
    assert (numbers["views"], numbers["config"]["cache"], numbers["config"]["uncached"]) == ({}, None, None)
    with pytest.raises(InputError, match="views: no encoder is named image; expected one of title-cls, title-mean"):
        iisan_fast.train("DATASET", config=recipe, method="full", views="image", dry_run=True)
