"""Write encoders with random weights as Hugging Face folders, given their sizes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save
from transformers import BertConfig, BertModel, BertTokenizer, PretrainedConfig, PreTrainedModel, ViTConfig, ViTModel

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_bert(folder: Path, sizes: Mapping[str, int], words: Sequence[str], seed: int) -> None:
    """Write a BERT with random weights and its tokenizer into a folder.

    The WordPiece vocabulary is the special tokens and the words. sizes: fields of transformers.BertConfig; without
    `vocab_size` the vocabulary sets it.
    """
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *words))}
    config = BertConfig(**{"vocab_size": len(vocabulary), **sizes})
    _write_model(BertModel, config, folder, seed)
    BertTokenizer(vocab=vocabulary, model_max_length=config.max_position_embeddings).save_pretrained(folder)


def common_words(texts: Iterable[str], vocabulary: int) -> list[str]:
    """Return the most frequent words of the texts, in falling order, as a vocabulary for `write_bert`.

    vocabulary: the number of entries, special tokens included, so there are at most `vocabulary - 5` words. Texts are
    split as BERT splits them.
    """
    rules = BertTokenizer(vocab={token: index for index, token in enumerate(SPECIAL_TOKENS)}).backend_tokenizer
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(text)))
    return [word for word, _ in counts.most_common(vocabulary - len(SPECIAL_TOKENS))]


def write_vit(folder: Path, sizes: Mapping[str, int], seed: int) -> None:
    """Write a ViT with random weights over square images, and the settings of its image processor, into a folder.

    sizes: fields of transformers.ViTConfig.
    """
    config = ViTConfig(**sizes)
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


def write_resized_vit(source: Path, folder: Path, sizes: Mapping[str, int], seed: int) -> None:
    """Write a ViT with the configuration in `source` but other sizes, and random weights as transformers draws them.

    sizes: the fields of transformers.ViTConfig to change. The settings of the image processor are copied from `source`.
    """
    config = ViTConfig.from_pretrained(source, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    shutil.copy(source / "preprocessor_config.json", folder)


def _write_model(kind: type[PreTrainedModel], config: PretrainedConfig, folder: Path, seed: int) -> None:
    """Write a model with random weights of variance 1 / fan-in, so that different inputs give different states."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind(config, add_pooling_layer=False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_().mul_(parameter[0].numel() ** -0.5)
    config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(save(model.state_dict(), metadata={"format": "pt"}))
