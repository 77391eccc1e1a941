"""What costs as much as the real thing: encoders of random weights, and a dataset whose images are noise."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from transformers import BertConfig, BertTokenizer, ViTConfig

from .. import demo
from ..config import ViewConfig, read_settings
from ..data import load_dataset, refuse_unfit_name
from ..encoders import SPECIAL_TOKENS, default_layers, write_bert, write_vit
from ..errors import InputError
from ..files import whole_folder
from ..progress import progress_bar
from ..states import ViewShape

NOISE_SIZE = 32  # pixels; encoders resize images anyway
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what a ViT and a BERT have of their own
    "base": ({}, {}),  # transformers' defaults are ViT-B/16 at 224 pixels and BERT-base
    "demo": (demo.IMAGE_ENCODER_SHAPE, demo.ENCODER_SHAPE),
}


def stand_ins(dataset: Path | None, folder: Path, size: str, seed: int) -> tuple[Path, list[ViewConfig]]:
    """Writes folder/dataset and folder/encoders, or finds them written, and returns their `demo.plan`.

    The dataset has the histories and titles of `dataset` (None: of the embedded demo), and an image of noise for each
    item of its catalogue; the encoders, a ViT and a BERT, are of one of SHAPES. Raises InputError where the folder
    holds something else.
    """
    made = {"dataset": dataset and str(dataset.resolve()), "encoders": size, "seed": seed}
    if folder.exists():
        if (found := read_settings(folder / "made.json")) != made:
            raise InputError(f"{folder}: expected what is made of {made}, found {found}; choose another folder")
        return demo.plan(folder)
    with whole_folder(folder) as new:
        data, (image, text) = demo.plan(new)
        _write_dataset(dataset, data, seed)
        vit, bert = _configurations(size)
        write_vit(Path(image.encoder), vit, seed)
        words = common_words(load_dataset(data).titles, bert.vocab_size - len(SPECIAL_TOKENS))
        write_bert(Path(text.encoder), bert, words, seed)
        (new / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return demo.plan(folder)


def state_shape(size: str) -> ViewShape:
    """(kept layers, width) of what either encoder gives."""
    config = _configurations(size)[0]
    return ViewShape(len(default_layers(1 + config.num_hidden_layers)), config.hidden_size)


def common_words(texts: Iterable[str], most: int) -> list[str]:
    """The words of texts, split as BERT splits them, the most frequent first."""
    rules = BertTokenizer(vocab={token: index for index, token in enumerate(SPECIAL_TOKENS)}).backend_tokenizer
    counts = Counter(
        word for text in texts for word, _ in rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(text))
    )
    return [word for word, _ in counts.most_common(most)]


def _configurations(size: str) -> tuple[ViTConfig, BertConfig]:
    vit, bert = SHAPES[size]
    return ViTConfig(**vit), BertConfig(**bert)


def _write_dataset(dataset: Path | None, folder: Path, seed: int) -> None:
    images = folder / "images"
    images.mkdir(parents=True)
    with TemporaryDirectory(prefix="iisan-fast-") as drawn:
        source = dataset or demo.write_demo(Path(drawn))[0]
        item_ids = load_dataset(source).sequences.item_ids
        for name in ("items.tsv", "users.tsv"):
            shutil.copyfile(source / name, folder / name)
    generator = np.random.default_rng(seed)
    with progress_bar("drawing noise", len(item_ids), "images") as advance:
        for item_id in item_ids:
            refuse_unfit_name(images, item_id)
            noise = generator.integers(0, 256, (NOISE_SIZE, NOISE_SIZE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(images / f"{item_id}.png", compress_level=1)
            advance(1)
