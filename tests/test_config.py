"""Configurations: JSON round trip, and every mistake named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iisan_fast.config import (
    LEARNING_RATES,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UncachedConfig,
    ViewConfig,
)
from iisan_fast.errors import InputError
from iisan_fast.setting_fields import from_dict, to_dict
from iisan_fast.settings_files import read_run_config

MINIMAL = {"dataset": "d", "cache": "c", "views": ["image"]}
VIEW = {"name": "image", "source": "image", "encoder": "e"}
UNCACHED, LAYERED, HALVED = (
    {"views": [{**VIEW, **change}]} for change in ({}, {"layers": [0, 2]}, {"encoder_dtype": "bfloat16"})
)


@given(st.integers(1, 512), st.sampled_from(["iisan", "iisan-versa"]), st.booleans(), st.floats(0, 0.9))
def test_json_round_trip(bottleneck, method, gates, dropout):
    model = ModelConfig(bottleneck=bottleneck, bottlenecks={"first": 512}, method=method, gates=gates, dropout=dropout)
    config = RunConfig("d", "c", ("a", "b"), model=model)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_views_round_trip():
    options = {"device_map": {"": 0}, "quantization_config": {"load_in_4bit": True}, "max_memory": None}
    view = ViewConfig("t", "title", "e", "cls", (0, 2, 4), options=options)
    assert from_dict(ViewConfig, json.loads(json.dumps(to_dict(view)))) == view
    assert from_dict(ViewConfig, {"name": "t", "source": "title", "encoder": "e"}).layers is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, "modle: unknown setting"),
        ({"model": {"bottleneckk": 3}}, "model.bottleneckk: unknown setting; did you mean bottleneck or bottlenecks?"),
        ({"model": {"bottleneck": "64"}}, 'model.bottleneck: expected int, found "64"'),
        ({"model": {"bottleneck": True}}, "model.bottleneck: expected int, found true"),
        ({"model": {"bottlenecks": {"third": 8}}}, "bottlenecks: expected one of first, second, inter, found 'third'"),
        ({"model": {"bottlenecks": {"first": 0}}}, "bottlenecks.first: expected 1 to"),
        ({"model": {"bottlenecks": {"inter": 8}}}, "bottlenecks.inter: the model has no such tower, but first"),
        (
            {"model": {"bottlenecks": {"first": 8}, "intra": False}, "views": ["a", "b"]},
            "bottlenecks.first: the model has no such tower, but inter",
        ),
        ({"model": {"method": "frozen", "bottlenecks": {"first": 8}}}, "bottlenecks: frozen has no towers"),
        ({"model": {"method": "iisam"}}, "method: expected one of iisan, iisan-versa"),
        ({"model": {"embedding_dim": 65}}, "embedding_dim: expected a multiple of attention_heads"),
        ({"model": {"dropout": 1}}, "dropout: expected 0 to below 1, found 1.0"),
        ({"model": {"intra": False, "inter": False}}, "found neither"),
        ({"model": []}, "model: expected names and values"),
        ({"train": {"batch_users": 0}}, "batch_users: expected 1 to"),
        (
            {"train": {"learning_rates": {"encoders": 1e-4}}},
            "learning_rates.encoders: iisan has adapters, gates, heads",
        ),
        ({"train": {"learning_rates": {"heads": 2}}}, "learning_rates.heads: expected 0 to below 1, found 2.0"),
        ({"evaluation": {"ks": [0]}}, "ks: expected at least 1, found 0"),
        ({"evaluation": {"ks": []}}, "ks: expected one or more cut-offs, found none"),
        ({"evaluation": {"ks": 10}}, "evaluation.ks: expected list"),
        ({"views": ["a", "a"]}, "views: expected different names, found a, a"),
        ({"views": ["a", "b", "c"]}, "views: iisan takes 1 or 2, found 3"),
        ({"views": []}, "views: iisan takes 1 or 2, found 0"),
        ({"cache": None}, "cache: iisan needs hidden states; give a cache, features, or encoders that run"),
        ({"uncached": UNCACHED}, "cache, uncached: expected one of them, found both"),
        ({"cache": None, "uncached": UNCACHED, "views": ["other"]}, "views: expected those that are encoded (image)"),
        ({"cache": None, "uncached": {**UNCACHED, "attention": "flash"}}, "attention: expected one of auto"),
        ({"cache": None, "uncached": {"views": [{}]}}, "uncached.views.name: missing setting"),
        ({"model": {"inter": True}}, "inter: the inter tower joins two views, found one"),
        ({"model": {"intra": False}}, "intra: one view has no inter tower"),
        ({"model": {"sanb": "mlp"}}, "sanb: expected one of adapter, phm, low-rank"),
        ({"model": {"layer_groups": 0}}, "layer_groups: expected 1 to"),
        ({"model": {"method": "full"}}, "method: full trains encoders, so they have to run; name encoders"),
        (
            {"model": {"method": "lora", "gates": False}},
            "gates: lora has no towers; false is for iisan and iisan-versa",
        ),
        ({"model": {"method": "frozen", "layer_groups": 3}}, "layer_groups: frozen has no towers"),
        ({"model": {"method": "id"}, "cache": None}, "views: id reads neither encoders nor their states"),
        ({"model": {"method": "id"}, "views": []}, "cache: id reads no states"),
        ({"model": {"sanb": "phm", "bottleneck": 30}}, "sanb: phm needs bottlenecks that 4 divides, found 30"),
        ({"model": {"method": "frozen"}, "train": {"precision": "bfloat16"}}, "precision: frozen has no products"),
        ({"model": {"method": "frozen", "bottleneck": 8}}, "bottleneck: frozen has no towers"),
        ({"cache": None, "uncached": {**UNCACHED, "items_at_once": 4}}, "items_at_once, checkpointing: are for full"),
        (
            {"cache": None, "uncached": {**UNCACHED, "checkpointing": True}},
            "lora, bitfit; iisan trains none",
        ),
        ({"cache": None, "uncached": LAYERED, "model": {"method": "lora"}}, "layers: lora reads view 'image'"),
        ({"cache": None, "uncached": LAYERED, "model": {"layer_groups": 2}}, "view 'image' names its layers already"),
        (
            {"cache": None, "uncached": {**UNCACHED, "dtype": "float16"}, "model": {"method": "full"}},
            "dtype: is for states that do not change; full trains encoders",
        ),
        ({"cache": None, "uncached": HALVED, "model": {"method": "full"}}, "encoder_dtype: full trains view 'image'"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(InputError) as error:
        from_dict(RunConfig, {**MINIMAL, **change})
    assert message in str(error.value)


def test_a_missing_setting_is_named():
    with pytest.raises(InputError, match="dataset: missing setting"):
        from_dict(RunConfig, {"cache": "c", "views": ["a"]})


def test_a_run_has_a_rate_for_each_group_of_its_method():
    for method, rates in LEARNING_RATES.items():
        views = () if method == "id" else ("image",)
        uncached = from_dict(UncachedConfig, UNCACHED) if views else None
        train = TrainConfig(learning_rates={"sequence_encoder": 0.5})
        config = RunConfig("d", None, views, uncached, model=ModelConfig(method), train=train)
        assert config.train.learning_rates == {**rates, "sequence_encoder": 0.5}
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_views_take_their_names_from_the_encoders():
    assert from_dict(RunConfig, {"dataset": "d", "uncached": UNCACHED}).views == ("image",)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_file_that_is_no_settings_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match="config.json"):
        read_run_config(path)


def test_defaults_are_the_papers():
    assert TrainConfig().batch_users == 64 and TrainConfig().patience == 10
    rates = dict(RunConfig("d", "c", ("a",)).train.learning_rates)
    assert rates.pop("adapters") == 1e-4 and set(rates.values()) == {2e-4}


def test_values_are_checked_and_turned_into_their_types():
    config = RunConfig(Path("data"), views=["image"], cache="c", train=TrainConfig(seed=np.int64(3)))
    assert config.dataset == "data" and config.views == ("image",) and type(config.train.seed) is int
    assert EvaluationConfig(ks=[5, 10]) == EvaluationConfig(ks=(5, 10))
    for settings, message in (
        ({"embedding_dim": "64"}, 'embedding_dim: expected int, found "64"'),
        ({"gates": 1}, "gates: expected bool, found 1"),
        ({"bottlenecks": {"first": 1.5}}, "bottlenecks.first: expected int, found 1.5"),
        ({"dropout": ModelConfig}, "dropout: expected float, found"),
        ({"dropout": 10**400}, "dropout: expected float, found 1000"),
    ):
        with pytest.raises(InputError, match=message):
            ModelConfig(**settings)
