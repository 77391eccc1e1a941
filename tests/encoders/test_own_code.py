"""Check that a checkpoint's own code is refused unless it is asked for by name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from helpers.encoders import refusal, view
from iisan_fast.encoders.loading import load_backbone

OPTION = "--trust-remote-code"


def copied(folder: Path, to: Path, changes: dict[str, dict], **files: str) -> Path:
    """Copy a checkpoint, with changed values in its JSON files and other files beside them."""
    shutil.copytree(folder, to)
    for name, values in changes.items():
        path = to / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    for name, text in files.items():
        (to / f"{name}.py").write_text(text)
    return to


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling_own.OwnModel"}}, "modeling_own.OwnModel for AutoModel"),
        ("config.json", {"auto_map": {"AutoConfig": "own.OwnConfig"}}, "own.OwnConfig for AutoConfig"),
        ("config.json", {"auto_map": {"AutoModel": "someone/code--m.Own"}}, "someone/code--m.Own for AutoModel"),
        ("config.json", {"auto_map": {"AutoModelForMaskedLM": "m.Own"}}, "m.Own for AutoModelForMaskedLM"),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "m.Own"}}}, "m.Own for AutoModel"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.Own", None]}}, "t.Own for AutoTokenizer"),
        ("tokenizer_config.json", {"auto_map": ["t.Own", "t.OwnFast"]}, "t.Own for AutoTokenizer"),
    ],
)
def test_own_code_of_a_text_encoder_is_refused(built, tmp_path, file, values, named):
    folder = copied(built("title", "bert"), tmp_path / "own", {file: values})
    assert f"{folder}: {file}: auto_map names {named}" in (message := refusal(folder)) and OPTION in message


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "p.Own"}}),
        ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "p.Own"}}}),
        ("preprocessor_config.json", {"auto_map": {"AutoFeatureExtractor": "p.Own"}}),
    ],
)
def test_own_code_of_an_image_processor_is_refused(built, tmp_path, file, values):
    message = refusal(copied(built("image", "vit"), tmp_path / "own", {file: values}), "image")
    assert f"{file}: auto_map names p.Own for" in message and OPTION in message


def test_own_code_that_is_not_loaded_is_no_matter(built, tmp_path):
    changes = {
        "preprocessor_config.json": {"auto_map": {"AutoImageProcessor": "p.Own"}},
        "config.json": {"auto_map": {}},
    }
    plain = load_backbone(view(built("title", "bert"))).describe()
    described = load_backbone(view(copied(built("title", "bert"), tmp_path / "own", changes))).describe()
    assert described["processor"] == plain["processor"] and described.keys() == plain.keys()


@pytest.mark.parametrize("value", [1, {"AutoModel": 3}, {"AutoModel": "no class"}, "own.OwnModel", [2]])
def test_an_auto_map_of_the_wrong_kind_is_refused(built, tmp_path, value):
    message = refusal(copied(built("title", "bert"), tmp_path / "own", {"config.json": {"auto_map": value}}))
    assert "config.json: auto_map" in message and "expected" in message


def test_an_architecture_that_a_python_file_defines_is_refused(built, tmp_path):
    changes = {"config.json": {"architectures": ["OwnModel"]}}
    folder = copied(
        built("title", "bert"), tmp_path / "own", changes, modeling="class OwnModel(BertModel):\n    pass\n"
    )
    assert "names the architecture OwnModel, which is code of its own in modeling.py" in refusal(folder)


def test_an_architecture_that_nobody_defines_is_mentioned(built, tmp_path, caplog):
    changes = {"config.json": {"architectures": ["OwnModel"]}}
    folder = copied(built("title", "bert"), tmp_path / "own", changes, handler="class Other:\n    pass\n")
    with caplog.at_level(logging.WARNING):
        load_backbone(view(folder))
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: config.json names the architecture OwnModel, which transformers does not have; BertModel takes its "
        "place"
    ]


def test_adapters_are_refused(built, tmp_path):
    beside = copied(built("title", "bert"), tmp_path / "beside", {"adapter_config.json": {"peft_type": "LORA"}})
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(beside / "adapter_config.json", alone)
    for folder in (beside, alone):
        assert "adapter_config.json: an adapter; merge it into its model" in refusal(folder)
