"""Check that damaged folders of encoders are refused in one line, without waiting and without much memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as hf

from helpers.encoders import refusal
from iisan_fast.encoders.checkpoint_files import refuse_damaged
from iisan_fast.errors import InputError

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


def changed(**values) -> Callable[[Path], None]:
    """Return a function that changes values in a JSON file."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replaced(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a function that puts something else in the place of a file."""

    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


fifo = replaced(os.mkfifo)
device = replaced(lambda path: path.symlink_to("/dev/zero"))
loop = replaced(lambda path: path.symlink_to(path.name))
deep = replaced(lambda path: path.write_text(DEEP))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(("spoil", "found"), [(fifo, "a FIFO"), (device, "a device"), (loop, "leads to itself")])
def test_what_is_no_file_is_refused(built, tmp_path, name, spoil, found):
    folder = shutil.copytree(built("title", "bert"), tmp_path / "bert")
    spoil(folder / name)
    message = refusal(folder)
    assert str(folder / name) in message and found in message


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("config.json", changed(hidden_size=10**9), "hidden_size: expected at most"),
        ("config.json", changed(num_hidden_layers=10**9), "num_hidden_layers: expected at most 10000"),
        ("config.json", changed(vocab_size=10**20), "vocab_size: expected at most"),
        ("config.json", changed(max_position_embeddings=10**11), "max_position_embeddings: expected at most"),
        ("config.json", changed(text_config={"intermediate_size": 10**10}), "intermediate_size: expected at most"),
        ("config.json", changed(hidden_size=float("inf")), "hidden_size: expected at most"),
        ("config.json", changed(hidden_size=48), "its weights have other shapes than its config.json says"),
        ("config.json", changed(num_attention_heads=0), "cannot be used as an encoder"),
        ("config.json", changed(hidden_size=-32), "cannot be used as an encoder"),
        ("config.json", deep, "not valid JSON"),
        ("tokenizer_config.json", deep, "not valid JSON"),
        ("tokenizer.json", deep, "cannot be used as an encoder"),
        ("tokenizer.json", replaced(lambda path: path.write_text("[]")), "cannot be used as an encoder"),
        ("tokenizer_config.json", changed(model_max_length="12"), "cannot be used as an encoder"),
        ("model.safetensors", replaced(lambda path: path.write_bytes(b"")), "cannot be used as an encoder"),
        ("model.safetensors", replaced(lambda path: path.write_bytes(b"\xff" * 7 + b"\0{}")), "cannot be used"),
    ],
)
def test_damaged_files_are_one_line(built, tmp_path, name, spoil, said):
    folder = shutil.copytree(built("title", "bert"), tmp_path / "bert")
    spoil(folder / name)
    assert said in refusal(folder)


@pytest.mark.parametrize("size", [{"height": 10**6, "width": 10**6}, {"shortest_edge": 10**6}, {"height": -3}])
def test_images_that_would_take_all_memory_are_refused(built, tmp_path, size):
    folder = shutil.copytree(built("image", "vit"), tmp_path / "vit")
    changed(size=size)(folder / "preprocessor_config.json")
    assert "expected images of 1 to 8192 pixels a side" in refusal(folder, "image")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda index, shard: shard.unlink(), "which is not in the folder"),
        (lambda index, shard: fifo(shard), "a FIFO"),
        (lambda index, shard: changed(weight_map={"a": "../../etc/passwd"})(index), "which is not in the folder"),
        (lambda index, shard: changed(weight_map=3)(index), "weight_map: expected the file of each weight, found 3"),
        (lambda index, shard: deep(index), "not valid JSON"),
    ],
)
def test_shards_that_are_missing_are_named(built, tmp_path, spoil, said):
    folder = shutil.copytree(built("title", "bert"), tmp_path / "bert")
    model = hf.BertModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    spoil(folder / "model.safetensors.index.json", sorted(folder.glob("model-*"))[1])
    assert said in refusal(folder)


def test_settings_of_published_models_are_accepted(tmp_path):
    """Their numbers are larger than those of tiny models: many positions, and edges that count pixels."""
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    config = {"max_position_embeddings": 10_485_760, "rope_theta": 10**10, "vocab_size": 2000, "image_token_id": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    refuse_damaged(tmp_path, complete=False)
    with pytest.raises(InputError, match="model-2.safetensors"):
        refuse_damaged(tmp_path, complete=True)
