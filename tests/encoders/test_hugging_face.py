"""Check loading: the cache comes before the hub, nothing is printed, and unusable folders and weights are refused."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from helpers.encoders import (
    BERT,
    refusal,
    save,
    view,
)
from iisan_fast.encoders.hub_files import cached_or_fetched
from iisan_fast.encoders.hugging_face import clear_errors
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError


def test_encoders_that_cannot_be_used_are_named(built, tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "cannot be used as an encoder" in refusal(tmp_path)
    assert "reads image, expected an encoder that reads text" in refusal(built("image", "vit"))
    assert "reads text, expected an encoder that reads image" in refusal(built("title", "bert"), "image")
    damaged = shutil.copytree(built("title", "bert"), tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:1000])
    assert "cannot be used as an encoder" in refusal(damaged)
    (damaged / "config.json").write_text('{"model_type": "bert", "hidden_size": "wide"}')
    assert "cannot be used as an encoder" in refusal(damaged)
    t5 = hf.T5Model(hf.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=40))
    assert "encoder-decoder; expected" in refusal(save(t5, tmp_path / "t5", None, "cls"), "image")


def test_a_hub_name_is_found_in_the_cache(built, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(built("title", "bert"), snapshot)
    (tmp_path / "models--owner--tiny" / "refs").mkdir()
    (tmp_path / "models--owner--tiny" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    described = load_backbone(view("owner/tiny")).describe()
    assert described == load_backbone(view(built("title", "bert"))).describe() | {
        "encoder": "owner/tiny",
        "commit": "0" * 40,
    }


def test_a_hub_name_that_is_not_cached_is_named():
    message = refusal("no-such-owner/no-such-encoder")
    assert message.startswith("no-such-owner/no-such-encoder: cannot be used as an encoder") and "offline" in message


def test_the_cache_is_asked_before_the_hub(tmp_path):
    """Without a network, a request to the hub fails only after minutes."""
    asked = []

    def load(encoder: str, local_files_only: bool) -> str:
        asked.append(local_files_only)
        if local_files_only and encoder == "owner/new":
            raise OSError("not in the cache")
        return encoder

    for encoder in ("owner/cached", "owner/new", str(tmp_path)):
        assert cached_or_fetched(load, encoder) == encoder
    assert asked == [True, True, False, False]


def test_loading_says_nothing_and_leaves_logging_as_it_was(built, capfd):
    hf.logging.set_verbosity_info()
    hf.logging.enable_progress_bar()
    try:
        load_backbone(view(built("title", "bert")))
        assert capfd.readouterr() == ("", "")
        assert hf.logging.get_verbosity() == hf.logging.INFO and hf.logging.is_progress_bar_enabled()
    finally:
        hf.logging.set_verbosity_warning()


def test_a_checkpoint_that_lacks_weights_is_refused(built, tmp_path):
    """The checkpoint has four blocks and the configuration five, so the fifth would be random."""
    folder = shutil.copytree(built("title", "bert"), tmp_path / "bert")
    config = hf.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 5
    config.save_pretrained(folder)
    assert "its checkpoint lacks 16 weights" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(built, tmp_path, value):
    """Attention on a CPU gives finite states although its queries are NaN."""
    folder = shutil.copytree(built("title", "bert"), tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "1.attention.self.query.weight" in name)
    weights[name][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1.attention.self.query.weight are not finite numbers" in refusal(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_of_other_numbers_than_the_model_s_is_refused(built, tmp_path, file):
    """Without the scales of a quantization, integers and 8-bit floats are no weights."""
    folder = shutil.copytree(built("title", "bert"), tmp_path / "bert")
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = next(name for name in whole if "1.attention.self.query.weight" in name)

    def store(dtype: torch.dtype) -> None:
        weights = {f"bert.{key}": values.to(dtype) if key == name else values for key, values in whole.items()}
        weights["bert.embeddings.position_ids"] = torch.arange(32)  # older checkpoints hold these integers
        if file.endswith("bin"):
            torch.save(weights, folder / file)
        else:
            save_file(weights, folder / file, metadata={"format": "pt"})

    for dtype, names in (
        (torch.int8, "int8 I8"),
        (torch.uint8, "uint8 U8"),
        (torch.float8_e4m3fn, "float8_e4m3fn F8_E4M3"),
    ):
        store(dtype)
        message = refusal(folder)
        assert f"{file}: weights bert.{name}: expected floating-point numbers" in message
        assert any(f"computes in float32, found {word} and" in message for word in names.split())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        store(dtype)
        assert load_backbone(view(folder)).depth == 5


def test_a_checkpoint_may_lack_a_pooler(tmp_path):
    folder = save(hf.BertModel(hf.BertConfig(**BERT), add_pooling_layer=False), tmp_path / "bert", None, "cls")
    assert load_backbone(view(folder)).depth == 5


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["FIFO", "link that leads to itself"])
def test_no_file_of_an_encoder_is_waited_for(tmp_path, file, kind):
    path = tmp_path / file
    if kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name)
    with pytest.raises(InputError, match=f"{file}: expected .* {kind}"), clear_errors(str(tmp_path), "an encoder"):
        raise AssertionError("the folder is looked at first")


def test_refused_memory_is_not_the_fault_of_an_encoder(tmp_path):
    with pytest.raises(MemoryError), clear_errors(str(tmp_path), "an encoder"):
        raise MemoryError
    with pytest.raises(RuntimeError, match="allocate"), clear_errors(str(tmp_path), "an encoder"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
