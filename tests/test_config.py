"""Configurations: JSON round trip, and every mistake named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iisan_fast.config import ModelConfig, RunConfig, TrainConfig, ViewConfig, from_dict, read_json, to_dict
from iisan_fast.errors import InputError

MINIMAL = {"dataset": "d", "cache": "c", "views": ["image"]}


@given(st.integers(1, 512), st.sampled_from(["iisan", "iisan-versa"]), st.booleans(), st.floats(0, 0.9))
def test_json_round_trip(bottleneck, method, gates, dropout):
    model = ModelConfig(bottleneck=bottleneck, method=method, gates=gates, dropout=dropout)
    config = RunConfig("d", "c", ("a", "b"), model=model)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_views_round_trip():
    view = ViewConfig("t", "title", "e", "cls", (0, 2, 4))
    assert from_dict(ViewConfig, json.loads(json.dumps(to_dict(view)))) == view
    assert from_dict(ViewConfig, {"name": "t", "source": "title", "encoder": "e"}).layers is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, "modle: unknown setting"),
        ({"model": {"bottleneckk": 3}}, "model.bottleneckk: unknown setting; expected one of method"),
        ({"model": {"bottleneck": "64"}}, 'model.bottleneck: expected int, found "64"'),
        ({"model": {"bottleneck": True}}, "model.bottleneck: expected int, found true"),
        ({"model": {"method": "iisam"}}, "method: expected one of iisan, iisan-versa"),
        ({"model": {"embedding_dim": 65}}, "embedding_dim: expected a multiple of attention_heads"),
        ({"model": {"dropout": 1}}, "dropout: expected a probability"),
        ({"model": {"intra": False, "inter": False}}, "found neither"),
        ({"model": []}, "model: expected Mapping"),
        ({"train": {"batch_users": 0}}, "batch_users: expected 1 to"),
        ({"train": {"learning_rates": {"adapters": 1e-4}}}, "learning_rates: expected one rate each"),
        ({"evaluation": {"ks": [0]}}, "ks: expected"),
        ({"evaluation": {"ks": 10}}, "evaluation.ks: expected list"),
        ({"views": ["a", "a"]}, "views: expected one or two different views"),
        ({"views": ["a", "b", "c"]}, "views: expected one or two different views"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(InputError) as error:
        from_dict(RunConfig, {**MINIMAL, **change})
    assert message in str(error.value)


def test_a_missing_setting_is_named():
    with pytest.raises(InputError, match="cache: missing setting"):
        from_dict(RunConfig, {"dataset": "d", "views": ["a"]})


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_file_that_is_no_settings_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match="config.json"):
        read_json(RunConfig, path)


def test_defaults_are_the_papers():
    assert TrainConfig().batch_users == 64 and TrainConfig().patience == 10
    rates = TrainConfig().learning_rates
    assert rates.pop("adapters") == 1e-4 and set(rates.values()) == {2e-4}
