"""Encoders of random weights, written as Hugging Face folders from their configurations alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save
from transformers import BertConfig, BertModel, BertTokenizer, PretrainedConfig, PreTrainedModel, ViTConfig, ViTModel

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_bert(folder: Path, config: BertConfig, words: Sequence[str], seed: int) -> None:
    """A BERT whose WordPiece vocabulary is the special tokens and some words, and its tokenizer."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *words))}
    _write_model(BertModel, config, folder, seed)
    BertTokenizer(vocab=vocabulary, model_max_length=config.max_position_embeddings).save_pretrained(folder)


def write_vit(folder: Path, config: ViTConfig, seed: int) -> None:
    """A ViT over square images, and its image processor's settings."""
    _write_model(ViTModel, config, folder, seed)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": Image.Resampling.BILINEAR.value,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_model(kind: type[PreTrainedModel], config: PretrainedConfig, folder: Path, seed: int) -> None:
    """Every matrix is drawn with variance 1 / fan-in, so that a random encoder still tells its inputs apart."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind(config, add_pooling_layer=False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_().mul_(parameter[0].numel() ** -0.5)
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(save(model.state_dict(), metadata={"format": "pt"}))
