"""Settings files: YAML and JSON are read as they are meant, and every mistake says the file and the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iisan_fast.config import ModelConfig, RunConfig, ViewConfig
from iisan_fast.errors import InputError
from iisan_fast.setting_fields import from_dict, to_dict
from iisan_fast.setting_sources import PARTS, base_settings
from iisan_fast.settings_files import parse_yaml_value, read_settings_file


@pytest.fixture
def write(tmp_path):
    def written(text: str, name: str = "settings.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return written


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E2", 300.0),
        (".5", 0.5),
        ("-7", -7),
        ("010", 10),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x1F", "0x1F"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("'true'", "true"),
        ('"1e-4"', "1e-4"),
        ("[0, 2, 4]", [0, 2, 4]),
        ("{first: 512}", {"first": 512}),
        ("a hub/name", "a hub/name"),
    ],
)
def test_values_of_yaml(text, value):
    parsed = parse_yaml_value(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("text", ["[1", "a: b: c", "*unknown", "!!python/name:os.system", "{a: 1, a: 2}"])
def test_a_value_that_is_no_yaml_is_refused(text):
    with pytest.raises(ValueError, match="expected a value as YAML, found"):
        parse_yaml_value(text)


def test_yes_and_no_take_the_type_of_the_setting(write):
    text = """
model: {gates: no, intra: on}
encoders:
  - {name: off, source: title, encoder: no, options: {low_cpu_mem_usage: yes, levels: [off, a]}}
"""
    values = base_settings(write(text))
    model = from_dict(ModelConfig, values["model"])
    assert (model.gates, model.intra) == (False, True)
    view = from_dict(ViewConfig, values["encoders"][0])
    assert (view.name, view.encoder) == ("off", "no") and type(view.name) is str
    assert view.options == {"low_cpu_mem_usage": True, "levels": [False, "a"]}


def test_a_run_s_config_is_a_settings_file(write):
    config = RunConfig("/d", "/c", ("title",), model=ModelConfig(bottlenecks={"first": 8}))
    for indent in (2, "\t"):
        text = json.dumps({"format": 2, **to_dict(config)}, indent=indent)
        assert from_dict(RunConfig, base_settings(write(text, "config.json"))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  dropout: 2", ":2: dropout: expected 0 to below 1, found 2.0"),
        ("train:\n\n  seed: x", ':3: train.seed: expected int, found "x"'),
        ("model: {dropuot: 0.1}", ":1: model.dropuot: unknown setting; did you mean dropout"),
        ("modle: {}", ":1: modle: unknown setting; did you mean model"),
        ("model:\n  - 1", ":1: model: expected names and values, found [1]"),
        ("uncached:\n  dtype: int8", ":2: dtype: expected one of bfloat16"),
        ("encoders:\n- source: title\n  encoder: e\n  max_tokens: 0", ":4: max_tokens: expected 1 to"),
        ("encoders:\n- source: title", ":2: encoders.1.encoder: missing setting"),
        ("encoders: e", ":1: encoders: expected a list of views, found 'e'"),
        ("encoders:\n- &v {source: title, encoder: e}\n- *v", ":1: encoders: two have one name (title, title)"),
        ("uncached: {views: []}\nencoders: []", ":2: encoders, uncached.views: are one setting"),
        ("seed: 1", ":1: seed: unknown setting"),
        ("train:\n  seed: 1\n  seed: 2", ":3: seed stands twice, first in line 2; leave one out"),
        ("train:\n\tseed: 1", ":2: neither YAML nor JSON (found a tab; YAML is indented by spaces)"),
        ('{"train": {"seed": 1}', ":1: neither YAML nor JSON"),
        ("[1, 2]", ": expected settings as YAML or JSON, found a sequence"),
        ("some text", ": expected settings as YAML or JSON, found a scalar"),
        ("", ": expected settings as YAML or JSON, found nothing"),
        ("a: !!python/name:os.system", ":1: expected a plain value, found the tag"),
        ("model: !!python/object:os.system {}", ":1: expected a plain value, found the tag"),
        ("views: !!set {a, b}", ":1: expected a plain value, found the tag"),
        ("train: {seed: " + "9" * 5000 + "}", ":1: the number has too many digits (5000)"),
        ("model: {}\nviews: title", ':2: views: expected list, found "title"'),
        ("\ncache: 3", ":2: cache: expected str, found 3"),
        ("[a]: 1", ":1: expected a name, found a sequence"),
        ("format: 3", ": format: expected 1 or 2, found 3; use the version of iisan-fast that made the run"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_place(write, text, message):
    path = write(text)
    with pytest.raises(InputError) as error:
        base_settings(path)
    assert str(error.value).startswith(f"{path}{message}") and "\n" not in str(error.value)


def test_anchors_do_not_fill_the_memory(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 10)]
    for text, message in (("\n".join(lines), "expected at most 10000 settings"), ("a: &a [*a]", "too many levels")):
        with pytest.raises(InputError, match=message):
            read_settings_file(write(text))


def test_an_empty_part_is_a_part_left_out(write):
    text = "".join(f"{part}:\n" for part in PARTS)
    assert base_settings(write(text)) == {}


def test_a_file_that_is_no_text_is_refused(tmp_path):
    image = tmp_path / "image.yaml"
    image.write_bytes(b"\x89PNG\xff\xfe")
    for path, message in ((image, "found bytes that are not UTF-8"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(InputError, match=message):
            read_settings_file(path)


def test_paths_of_a_file_are_taken_from_the_working_folder(write, monkeypatch, tmp_path):
    path = write("dataset: data\ncache: states/a")
    monkeypatch.chdir(tmp_path)
    values = base_settings(path)
    assert (values["dataset"], values["cache"]) == (str(tmp_path / "data"), str(tmp_path / "states" / "a"))
