"""Check that a checkpoint's own code runs if it is asked for by name, and is refused otherwise."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

from helpers.encoders import TITLES, differing, pictures, refusal, view
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError

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


MODEL = """
from transformers import BertModel
from .own_parts import SCALE

class OwnModel(BertModel):
    def forward(self, *arguments, **keywords):
        output = super().forward(*arguments, **keywords)
        output["last_hidden_state"] = output.last_hidden_state * SCALE
        if output.hidden_states is not None:
            output["hidden_states"] = (*output.hidden_states[:-1], output.last_hidden_state)
        return output
"""
PARTS = "SCALE = {}\n"
AUTO_MAP = {"config.json": {"auto_map": {"AutoModel": "modeling_own.OwnModel"}}}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Let transformers keep its copies of own code in a folder of the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def own_model(built, folder: Path, scale: float) -> Path:
    return copied(built("title", "bert"), folder, AUTO_MAP, modeling_own=MODEL, own_parts=PARTS.format(scale))


def test_own_code_runs_if_it_is_asked_for(built, tmp_path, modules):
    plain = load_backbone(view(built("title", "bert"), max_tokens=12))
    backbone = load_backbone(view(own_model(built, tmp_path / "own", 2), max_tokens=12, trust_remote_code=True))
    assert type(backbone.model).__name__ == "OwnModel"
    inputs = plain.prepare(TITLES)
    expected = plain.encode(inputs) * torch.tensor([1, 1, 2])[:, None]
    torch.testing.assert_close(backbone.encode(inputs), expected)
    described = backbone.describe()
    new = {"encoder", "weights", "trust_remote_code", "code"}
    assert differing(described, plain.describe()) - {"final_state"} == new


def test_the_digest_covers_the_code_that_runs(built, tmp_path, modules):
    def described(folder: Path) -> dict:
        return load_backbone(view(folder, trust_remote_code=True)).describe()

    first = described(own_model(built, tmp_path / "first", 2))
    assert differing(described(own_model(built, tmp_path / "same", 2)), first) == {"encoder"}
    (tmp_path / "first" / "own_parts.py").write_text(PARTS.format(5))
    assert differing(described(tmp_path / "first"), first) == {"weights", "code"}


def test_trust_changes_nothing_for_a_checkpoint_without_code(built):
    plain = load_backbone(view(built("title", "bert")))
    trusted = load_backbone(view(built("title", "bert"), trust_remote_code=True))
    assert trusted.describe() == plain.describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config.json": {"auto_map": {"AutoModelForMaskedLM": "modeling_own.OwnModel"}}}, "and none for AutoModel"),
        ({"config.json": {"auto_map": {"AutoTokenizer": "t.Own"}}}, "its code t.Own for AutoTokenizer did not run"),
        ({"config.json": {"auto_map": {"AutoModel": "missing.OwnModel"}}}, "missing.py"),
        ({"config.json": {"auto_map": {"AutoModel": "modeling_own.Missing"}}}, "Missing"),
    ],
)
def test_own_code_that_cannot_run_is_refused(built, tmp_path, modules, changes, message):
    folder = copied(built("title", "bert"), tmp_path / "own", changes, modeling_own=MODEL, own_parts=PARTS.format(2))
    assert message in refusal(folder, trust_remote_code=True)


def test_own_tokenizers_run_if_they_are_asked_for(built, tmp_path, modules):
    code = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, **options):
        return super().__call__([part.upper() for part in text] if isinstance(text, list) else text, **options)
"""
    changes = {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}}}
    folder = copied(built("title", "bert"), tmp_path / "own", changes, own_tokenizer=code)
    assert "own_tokenizer.OwnTokenizer for AutoTokenizer" in refusal(folder)
    backbone = load_backbone(view(folder, trust_remote_code=True))
    assert backbone.tokenize(["w1 w2"]) == [[4, 0, 0, 5]] and "code" in backbone.describe()


def test_own_image_processors_run_if_they_are_asked_for(built, tmp_path, modules):
    code = """
from transformers import ViTImageProcessorPil

class OwnProcessor(ViTImageProcessorPil):
    def __call__(self, images, **options):
        return super().__call__([image.transpose(0) for image in images], **options)
"""
    changes = {"preprocessor_config.json": {"auto_map": {"AutoImageProcessor": "own_processor.OwnProcessor"}}}
    folder = copied(built("image", "vit"), tmp_path / "own", changes, own_processor=code)
    assert "own_processor.OwnProcessor for AutoImageProcessor" in refusal(folder, "image")
    backbone = load_backbone(view(folder, "image", trust_remote_code=True))
    plain = load_backbone(view(built("image", "vit"), "image"))
    expected = plain.prepare([picture.transpose(0) for picture in pictures()])["pixel_values"]
    assert torch.equal(backbone.prepare(pictures())["pixel_values"], expected) and "code" in backbone.describe()


def test_a_pickle_among_the_weights_runs_no_code(built, tmp_path):
    folder = copied(built("title", "bert"), tmp_path / "own", {})
    (folder / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(str(ran))))
    assert "cannot be used as an encoder" in refusal(folder) and not ran.exists()
    torch.save({"weights": Touch(str(ran))}, folder / "pytorch_model.bin")
    assert "cannot be used as an encoder" in refusal(folder) and not ran.exists()
    for option in ("weights_only", "use_kernels", "ignore_mismatched_sizes", "adapter_kwargs", "trust_remote_code"):
        with pytest.raises(InputError, match=f"options.{option}: is decided here"):
            view(folder, options={option: False})


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
