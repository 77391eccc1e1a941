"""The committed recipes are configurations that train takes, and the list of them is whole."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from iisan_fast.cli.extract import extract
from iisan_fast.cli.views import chosen_views
from iisan_fast.config import RunConfig
from iisan_fast.models.side_network import SideNetwork
from iisan_fast.setting_fields import from_dict
from iisan_fast.settings_files import read_settings

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_a_configuration(recipe):
    values = {"dataset": "d", "cache": "c", "views": ["image", "title"], **read_settings(recipe)}
    config = from_dict(RunConfig, values)
    network = SideNetwork([(7, 24), (7, 24 if config.model.method == "iisan" else 48)], config.model)
    widths = {name: getattr(network, name).down_bias.shape[1] for name in network.towers}
    image = 512 if recipe.stem == "microlens-100k-versa" else 64
    assert widths == {"first": image, "second": 64, "inter": 64}
    assert config.train.batch_users == (512 if recipe.stem == "microlens-100k-versa" else 64)
    rates = {"adapters": 1e-4, "gates": 2e-4, "heads": 2e-4, "sequence_encoder": 2e-4}
    assert config.train.learning_rates == rates and config.model.embedding_dim == 64 and config.model.dropout == 0.1


def test_the_options_of_the_list_are_those_that_extract_takes():
    """All that stand there in code, as they stand."""
    texts = re.findall(r"`(--[^`]+)`", (FOLDER / "README.md").read_text())
    found = []
    for text in [text for text in texts if "encoder" in text and not text.startswith("--encoder-option")]:
        options = extract.make_context("extract", ["DATASET", "--cache", "STATES", *shlex.split(text)]).params
        found.append([(view.source, view.pooling, view.layers, view.max_tokens) for view in chosen_views(options)])
    assert len(found) == 6
    minilm, language_model = found[-2:]
    assert minilm == [("title", pooling, (0, 2, 4, 6), 64) for pooling in ("cls", "mean")]
    assert language_model == [("title", None, (0, 5, 20, 35, 50, 65, 80), 30)]


def test_a_recipe_that_was_run_has_the_settings_of_its_results():
    recipe = read_settings(FOLDER / "scientific-minilm.json")
    run = read_settings(FOLDER.parent / "benchmarks" / "results" / "scientific-titles-64-tokens.config.json")
    run["train"]["max_epochs"] = recipe["train"]["max_epochs"]  # 40 at first, then on to the early stop
    for section, values in recipe.items():
        assert values.items() <= run[section].items()


def test_every_recipe_is_listed_with_whether_it_was_run():
    lines = (FOLDER / "README.md").read_text().splitlines()
    for recipe in RECIPES:
        (line,) = [line for line in lines if line.startswith("|") and f"`{recipe.stem}`" in line]
        assert line.endswith("| not run |") or "benchmarks/results/" in line
