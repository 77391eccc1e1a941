"""The committed recipes are configurations that train takes, and the list of them is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from iisan_fast.config import RunConfig, from_dict, read_settings
from iisan_fast.side_network import SideNetwork

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


def test_every_recipe_is_listed_with_whether_it_was_run():
    lines = (FOLDER / "README.md").read_text().splitlines()
    for recipe in RECIPES:
        (line,) = [line for line in lines if line.startswith("|") and f"`{recipe.stem}`" in line]
        assert line.endswith("| not run |") or "benchmarks/results/" in line
