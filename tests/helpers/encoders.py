"""Tiny encoders of every family, randomly initialised, and their expected states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from iisan_fast.config import ViewConfig
from iisan_fast.encoders.loading import load_backbone
from iisan_fast.errors import InputError

SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
LLM = {**SHAPE, "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64, "head_dim": 8}
VISION = {**SHAPE, "image_size": 32, "patch_size": 8}
CLIP_TEXT = {**SHAPE, "vocab_size": 40, "max_position_embeddings": 32, "eos_token_id": 3, "bos_token_id": 2}
PAIR_TEXT = {**CLIP_TEXT, "projection_size": 32}
BERT = {**SHAPE, "vocab_size": 40, "max_position_embeddings": 32}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
DEBERTA |= {"type_vocab_size": 0, "norm_rel_ebd": "layer_norm", "share_att_key": True}

# Family: how its tiny model is built, its tokenizer's style, its default pooling, the kind of its last hidden state.
Family = tuple[Callable[[], hf.PreTrainedModel], str, str, str]
TEXT: dict[str, Family] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**BERT)), "cls", "cls", "normalised"),
    "deberta-v3": (lambda: hf.DebertaV2Model(hf.DebertaV2Config(**DEBERTA)), "cls", "cls", "normalised"),
    "roberta": (lambda: hf.RobertaModel(hf.RobertaConfig(**BERT, pad_token_id=1)), "cls", "cls", "normalised"),
    "llama": (lambda: hf.LlamaModel(hf.LlamaConfig(**LLM)), "bare", "mean", "normalised"),
    "qwen2": (lambda: hf.Qwen2Model(hf.Qwen2Config(**LLM)), "bytes", "mean", "normalised"),
    "mistral": (lambda: hf.MistralModel(hf.MistralConfig(**LLM)), "bos", "mean", "normalised"),
    "gemma": (lambda: hf.GemmaModel(hf.GemmaConfig(**LLM)), "bos", "mean", "normalised"),
    "clip text tower": (lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP_TEXT)), "clip", "mean", "unnormalised"),
    "clip": (
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=PAIR_TEXT, vision_config=VISION)),
        "clip",
        "mean",
        "unnormalised",
    ),
    "siglip": (
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=PAIR_TEXT, vision_config=VISION)),
        "clip",
        "mean",
        "unnormalised",
    ),
    "siglip text tower": (lambda: hf.SiglipTextModel(hf.SiglipTextConfig(**PAIR_TEXT)), "clip", "mean", "unnormalised"),
}
IMAGE: dict[str, tuple[Callable[[], hf.PreTrainedModel], str, str, str]] = {
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**VISION)), "ViTImageProcessor", "cls", "unnormalised"),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**VISION)), "BitImageProcessor", "cls", "unnormalised"),
    "dinov2 with registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)),
        "BitImageProcessor",
        "cls",
        "unnormalised",
    ),
    "clip": (TEXT["clip"][0], "CLIPImageProcessor", "cls", "unnormalised"),
    "clip vision tower": (
        lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)),
        "CLIPImageProcessor",
        "cls",
        "unnormalised",
    ),
    "siglip": (TEXT["siglip"][0], "SiglipImageProcessor", "mean", "unnormalised"),
    "siglip vision tower": (
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)),
        "SiglipImageProcessor",
        "mean",
        "unnormalised",
    ),
}
WORDS = ["[UNK]", "[PAD]", "<s>", "</s>", "[CLS]", "[SEP]", *(f"w{i}" for i in range(34))]
TITLES = ["w1", "w2 w3 w4", "w5 " * 20, "w6 w7 w8 w9 w10 w11", "w12 w13"]


def tokenizer(style: str) -> hf.PreTrainedTokenizerFast:
    """Return a word-level tokenizer: BERT's [CLS]…[SEP], CLIP's <s>…</s>, a language model's <s>…, or plain."""
    if style == "bytes":  # Qwen's tokenizer class: transformers loads it even if the folder's files name another
        vocabulary = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz0123456789Ġ"]
        return hf.Qwen2Tokenizer(vocab={c: i for i, c in enumerate(vocabulary)}, merges=[], model_max_length=32)
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    templates = {"cls": "[CLS] $A [SEP]", "clip": "<s> $A </s>", "bos": "<s> $A", "bare": "$A"}
    templates |= {"closed": "$A </s>", "xlnet": "$A [SEP] [CLS]"}
    special = [(word, WORDS.index(word)) for word in ("<s>", "</s>", "[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(single=templates[style], special_tokens=special)
    classed = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    names = {"cls": classed, "xlnet": classed, "bare": {}}
    named = names.get(style, {"bos_token": "<s>", "eos_token": "</s>"})
    # The language models have no padding token, and their default padding side is the wrong one.
    side = "left" if style in ("bos", "bare", "xlnet") else "right"
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", model_max_length=32, padding_side=side, **named
    )


def save(model: hf.PreTrainedModel, folder: Path, processor: str | None, style: str | None) -> Path:
    with torch.no_grad():  # far from the initial 0.02, so that attention and norms change the states visibly
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if style:
        tokenizer(style).save_pretrained(folder)
    if processor:
        size = {"shortest_edge": 32} if "Bit" in processor or "CLIP" in processor else {"height": 32, "width": 32}
        getattr(hf, processor + "Pil")(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_as(model: hf.PreTrainedModel, folder: Path, style: str) -> Path:
    model.save_pretrained(folder)
    tokenizer(style).save_pretrained(folder)
    return folder


def view(folder: Path, source: str = "title", **changes) -> ViewConfig:
    return ViewConfig("v", source, str(folder), **{"encoder_dtype": "float32", **changes})


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((32, 32), (50, 40), (20, 90))]


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(InputError) as error:
        load_backbone(view(*arguments, **keywords))
    assert "\n" not in str(error.value)
    return str(error.value)


def differing(first: dict, second: dict) -> set[str]:
    return {key for key in first | second if first.get(key) != second.get(key)}


def tower(folder: Path, name: str, dtype: torch.dtype) -> torch.nn.Module:
    model_class = getattr(hf, hf.AutoConfig.from_pretrained(folder).architectures[0])
    model = model_class.from_pretrained(folder, dtype=dtype).eval()
    return getattr(model, name, model)


@torch.no_grad()
def texts_one_by_one(folder: Path, texts: list[str], pooling: str, layers, dtype=torch.float32) -> torch.Tensor:
    model = tower(folder, "text_model", dtype)
    tokenise = hf.AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        ids = torch.tensor([tokenise(text, truncation=True, max_length=12).input_ids])
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        pool = {"cls": lambda h: h[0, 0], "mean": lambda h: h[0].mean(dim=0), "last": lambda h: h[0, -1]}[pooling]
        rows.append(torch.stack([pool(states[layer].float()) for layer in layers]))
    return torch.stack(rows)
