"""The arithmetic of docs/a-hundred-million-items.md: figures from formulas, constants from the code."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from helpers.documents import ROOT
from iisan_fast.config import ModelConfig, ProtocolConfig, ScoringConfig, TrainConfig
from iisan_fast.models.recommender import Recommender
from iisan_fast.models.side_network import SideItemEncoder
from iisan_fast.states import ViewShape

PAGE = (ROOT / "docs" / "a-hundred-million-items.md").read_text(encoding="utf-8")
UNITS = {"": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "ms": 1e-3, "s": 1}
CONSTANTS = {
    name: float(value.replace(",", ""))
    for name, value in re.findall(r"^\| `(\w+)` \| ([\d,.e]+) \|", PAGE, re.MULTILINE)
}
LINES = re.findall(r"^\| ([^|]+) \| `([^`]+)` \| ([\d,.]+(?:e\d+)?) ?(\w*) \|$", PAGE, re.MULTILINE)


def test_the_page_has_its_tables():
    assert len(CONSTANTS) == 17
    assert len(LINES) == 31
    assert PAGE.count("\n| ") == 17 + 31 + 5  # and the heads of five tables


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[0])
def test_a_figure_follows_from_its_formula(line):
    _, formula, figure, unit = line
    value = eval(formula, {"__builtins__": {}}, CONSTANTS)  # a formula of the project's own page
    mantissa, _, exponent = figure.replace(",", "").partition("e")
    scale = UNITS[unit] * 10 ** int(exponent or 0)
    decimals = len(mantissa.partition(".")[2])
    assert abs(value / scale - float(mantissa)) <= 0.5 * 10**-decimals + 1e-9


def test_constants_are_those_of_the_code():
    model = ModelConfig()
    shapes = [ViewShape(int(CONSTANTS["layers"]), int(CONSTANTS["width"]))] * int(CONSTANTS["views"])
    inputs = ProtocolConfig().max_inputs
    recommender = Recommender(lambda: SideItemEncoder(shapes, model), model, inputs, np.ones(2) / 2, seed=0)
    loaded = json.loads((ROOT / "benchmarks" / "results" / "checked-loading.json").read_text())
    expected = {
        "d": model.embedding_dim,
        "users": TrainConfig().batch_users,
        "slots": inputs + 1,
        "parameters": sum(parameter.numel() for parameter in recommender.parameters()),
        "similarity_dims": ScoringConfig().similarity_dims,
        "loading": pytest.approx(loaded["bytes"] / loaded["checked"]["seconds"], rel=0.01),
    }
    assert {name: CONSTANTS[name] for name in expected} == expected
