"""Changes by dotted name: every setting has one, and a wrong name is answered with the right one."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import pytest

from iisan_fast.config import RunConfig, UncachedConfig, ViewConfig
from iisan_fast.errors import InputError
from iisan_fast.setting_fields import from_dict, settings_of, to_dict
from iisan_fast.setting_sources import PARTS, SECTIONS, base_settings, change_settings, parse_changes
from iisan_fast.settings import extraction_config, run_config

VIEWS = [
    {"source": "title", "encoder": "e", "pooling": "cls"},
    {"name": "image", "source": "image", "encoder": "v", "layers": [0, 2]},
]


def changed(text: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    values = {} if values is None else values
    change_settings(values, parse_changes([text]))
    return values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("model.dropout=0.2", {"model": {"dropout": 0.2}}),
        ("model.bottlenecks.first=512", {"model": {"bottlenecks": {"first": 512}}}),
        ("train.learning_rates.heads=3e-4", {"train": {"learning_rates": {"heads": 3e-4}}}),
        ("evaluation.ks=[5, 10]", {"evaluation": {"ks": [5, 10]}}),
        ("extraction.dtype=float16", {"extraction": {"dtype": "float16"}}),
        ("uncached.items_at_once=", {"uncached": {"items_at_once": None}}),
        ("cache=a=b", {"cache": "a=b"}),
    ],
)
def test_a_change_sets_one_setting(text, values):
    assert changed(text) == values


def test_a_change_keeps_the_other_entries():
    values = {"train": {"learning_rates": {"gates": 0.1}, "seed": 3}}
    assert changed("train.learning_rates.heads=0.2", values) == {
        "train": {"learning_rates": {"gates": 0.1, "heads": 0.2}, "seed": 3}
    }


def test_an_encoder_is_named_by_its_view():
    values = base_settings({"encoders": VIEWS})
    assert [view["name"] for view in values["encoders"]] == ["title-cls", "image"]
    changed("encoders.title-cls.max_tokens=64", values)
    changed("encoders.image.options.device_map=auto", values)
    assert values["encoders"][0]["max_tokens"] == 64 and values["encoders"][1]["options"] == {"device_map": "auto"}
    run = to_dict(RunConfig("d", uncached=UncachedConfig([ViewConfig("title", "title", "e")])))
    config = run_config({}, base_settings(run), changes={"encoders.title.max_tokens": 7})
    assert config.uncached.views[0].max_tokens == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dropout=1", "dropout: unknown setting; did you mean model.dropout?"),
        ("dtype=float32", "dtype: unknown setting; did you mean uncached.dtype or extraction.dtype?"),
        ("modle.dropout=1", "modle.dropout: unknown setting; did you mean model"),
        ("model.dropuot=1", "model.dropuot: unknown setting; did you mean model.dropout or "),
        ("model=1", "model: is a section of settings; name one of them, as model.method"),
        ("model.dropout.first=1", "model.dropout.first: dropout is one value; leave out .first"),
        ("cache.x=1", "cache.x: unknown setting; did you mean cache"),
        ("encoders.titel.max_tokens=1", "encoders.titel.max_tokens: unknown encoder; did you mean title?"),
        ("encoders.title.max_token=1", "encoders.title.max_token: unknown setting; did you mean encoders.title.max_to"),
        ("encoders=1", "encoders: unknown encoder; expected one of title"),
        ("model.dropout", "--set: expected SECTION.FIELD=VALUE, found 'model.dropout'"),
        ("=1", "--set: expected SECTION.FIELD=VALUE, found '=1'"),
        ("model.dropout=[1", "--set model.dropout: expected a value as YAML, found '[1'"),
    ],
)
def test_a_wrong_change_is_one_line(text, message):
    with pytest.raises(InputError) as error:
        changed(text, {"encoders": [to_dict(ViewConfig("title", "title", "e"))]})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_every_field_can_be_changed_and_is_described():
    """Check that each has a dotted name, a help text of one sentence, and a default that its rules accept."""
    for part, section in SECTIONS.items():
        settings = settings_of(section)
        assert list(settings) == [field.name for field in dataclasses.fields(section)]
        for name, setting in settings.items():
            text = setting.rules.help
            assert text.endswith(".") and text[0].isupper() and len(text) < 160, f"{part}.{name}"
            value = {} if typing.get_origin(setting.type) is Mapping else setting.default
            values: dict[str, Any] = {}
            change_settings(values, {f"{part}.{name}": value})
            assert values == {part: {name: value}}
        if section is not UncachedConfig:
            defaults = {name: setting.default for name, setting in settings.items()}
            assert to_dict(from_dict(section, defaults)) == to_dict(section())


def test_settings_go_before_the_file_and_changes_go_last():
    base = base_settings({"dataset": "d", "model": {"method": "id", "dropout": 0.3, "blocks": 4}, "train": {"seed": 1}})
    config = run_config({"dropout": 0.2, "seed": 2}, base, changes={"train.seed": 3})
    assert (config.model.dropout, config.model.blocks, config.train.seed) == (0.2, 4, 3)


def test_an_extraction_takes_its_settings_from_file_options_and_changes():
    base = base_settings(
        {"dataset": "d", "cache": "c", "encoders": VIEWS, "extraction": {"batch_size": 8, "dtype": "float16"}}
    )
    plan = extraction_config({"batch_size": 4, "max_inputs": 7}, base, changes={"encoders.image.layers": [0]})
    assert (plan.config.batch_size, plan.config.dtype, plan.protocol.max_inputs) == (4, "float16", 7)
    assert [view.name for view in plan.views] == ["title-cls", "image"] and plan.views[1].layers == (0,)
    other = extraction_config({"text_encoder": "t"}, base)
    assert [view.encoder for view in other.views] == ["t"]
    for settings, changes, message in (
        ({}, {"model.dropout": 0.2}, "model.dropout: is no setting of this command; expected one of dataset, cache"),
        ({"layer_groups": 2}, {}, "layer_groups: view 'image' names its layers already"),
    ):
        with pytest.raises(InputError, match=message):
            extraction_config(settings, base, changes=changes)
    for name in ("dataset", "cache"):
        with pytest.raises(InputError, match=f"{name}: none given; name a folder, or a settings file that does"):
            extraction_config({}, {part: value for part, value in base.items() if part != name})


def test_every_part_of_a_run_is_a_part_of_a_file():
    assert {field.name for field in dataclasses.fields(RunConfig)} | {"encoders", "extraction"} == set(PARTS)


def test_an_empty_list_of_views_is_all_views_of_the_cache(toy_run):
    dataset, cache = toy_run
    config = run_config({"dataset": dataset, "cache": cache}, base_settings({"views": []}))
    assert config.views == ("image", "title")


def test_encoders_that_are_named_replace_a_file_s_cache_and_encoders():
    base = base_settings({"dataset": "d", "cache": "c", "views": ["image"], "encoders": VIEWS})
    other = ViewConfig("other", "title", "e")
    config = run_config({}, base, [other])
    assert config.cache is None and config.uncached.views == (other,) and config.views == ("other",)
    for settings, changes in (({"cache": "c"}, {}), ({}, {"cache": "c"})):
        with pytest.raises(InputError, match="cache, uncached: expected one of them, found both"):
            run_config(settings, base, [other], changes=changes)


def test_a_view_s_name_may_hold_dots():
    values = {"encoders": [to_dict(ViewConfig(name, "title", "e")) for name in ("v1", "v1.5")]}
    changed("encoders.v1.5.max_tokens=7", values)
    changed("encoders.v1.pooling=cls", values)
    assert [(view["max_tokens"], view["pooling"]) for view in values["encoders"]] == [(30, "cls"), (7, None)]
