"""Encoders of random weights and a dataset of noise images, which cost as much as real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from .. import demo
from ..config import ViewConfig
from ..data import load_dataset, refuse_unfit_name
from ..encoders import common_words, default_layers, write_bert, write_vit
from ..errors import InputError
from ..files import whole_folder
from ..progress import progress_bar
from ..settings_files import read_settings
from ..states import ViewShape

NOISE_SIZE = 32  # pixels; encoders resize images anyway
VOCABULARY = 30_522  # BERT's tokens
BASE_SHAPE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SHAPES: dict[str, tuple[dict[str, int], dict[str, int]]] = {  # of a ViT and of a BERT
    "base": ({"image_size": 224, "patch_size": 16, **BASE_SHAPE}, BASE_SHAPE),  # ViT-B/16 and BERT-base
    "demo": (demo.IMAGE_ENCODER_SHAPE, demo.ENCODER_SHAPE),
}


def stand_ins(dataset: Path | None, folder: Path, size: str, seed: int) -> tuple[Path, list[ViewConfig]]:
    """Write folder/dataset and folder/encoders, unless they exist, and return the dataset and the views.

    The dataset has the histories and titles of `dataset` (None: of the embedded demo) and a noise image for each item.
    The encoders, a ViT and a BERT, have one of SHAPES. Raises InputError if the folder holds something else.
    """
    content = {"dataset": dataset and str(dataset.resolve()), "encoders": size, "seed": seed}
    if folder.exists():
        stored = read_settings(folder / "made.json")
        if stored != content:
            raise InputError(f"{folder}: expected stand-ins of {content}, found {stored}; choose another folder")
        return demo.plan(folder)
    with whole_folder(folder) as new:
        data, (image, text) = demo.plan(new)
        _write_dataset(dataset, data, seed)
        vit, bert = SHAPES[size]
        write_vit(Path(image.encoder), vit, seed)
        words = common_words(load_dataset(data).titles, VOCABULARY)
        write_bert(Path(text.encoder), {"vocab_size": VOCABULARY, **bert}, words, seed)
        (new / "made.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return demo.plan(folder)


def state_shape(size: str) -> ViewShape:
    """Return the number of kept layers and the width of either encoder's states. size: a key of SHAPES."""
    image_shape, _ = SHAPES[size]
    return ViewShape(len(default_layers(1 + image_shape["num_hidden_layers"])), image_shape["hidden_size"])


def _write_dataset(dataset: Path | None, folder: Path, seed: int) -> None:
    """Write a dataset with the titles and histories of `dataset`, or of the demo, and images of noise."""
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
