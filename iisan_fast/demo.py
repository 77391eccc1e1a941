"""The embedded demo: a synthetic catalogue whose content predicts the next item, and two small frozen encoders.

A product has a material, which only its title names, a colour, which only its picture shows, and a kind, which both
show. A user's next item follows from material and colour, so a model needs both views. Each item is bought too rarely
to be learned from interactions alone. The same seed writes the same bytes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from .config import LEARNING_RATES, METHODS, NEIGHBOURS, TUNING_METHODS, ModelConfig, RunConfig, ViewConfig
from .data import load_dataset
from .encoders import grouped_layers, write_bert, write_vit
from .errors import InputError, check_choice
from .files import absolute_path, naming
from .ranks import ALONE, Ranks
from .setting_fields import to_dict
from .settings import run_config
from .states import extract
from .training import JobRunFolder, RunFolder, check_new_run, describe_new_run

if TYPE_CHECKING:
    import torch

LOGGER = logging.getLogger(__name__)

ITEMS = 1920
USERS = 1600
HISTORY_LENGTHS = (6, 9)  # shortest and longest
SURPRISE = 0.15  # share of interactions that follow no taste
IMAGE_SIZE = 64  # pixels

MATERIALS = ("oak", "steel", "linen", "glass", "wool", "clay", "leather", "bamboo", "marble", "copper", "felt", "cane")
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (240, 215, 40),
    "green": (50, 160, 60),
    "cyan": (40, 190, 200),
    "blue": (35, 85, 200),
    "violet": (130, 60, 190),
    "pink": (240, 110, 190),
}
PATTERNS = ("plain", "striped", "dotted")
BACKGROUNDS = ((255, 255, 255), (226, 226, 226), (190, 190, 190))
BRANDS = ("velora", "nordhus", "kestrel", "amberly", "tidewell", "foxglove", "quillon", "marrow", "sable", "juniper")
OCCASIONS = ("camping", "travel", "garden", "office", "kitchen", "beach", "winter", "party")
ENCODER_SHAPE = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 128}
IMAGE_ENCODER_SHAPE = {"image_size": IMAGE_SIZE, "patch_size": IMAGE_SIZE // 4, **ENCODER_SHAPE}

NO_CHANGES: Mapping[str, Any] = {}
NOT_CHANGED = {"dataset", "cache", "views", "encoders", "init"}  # parts of settings that the demo makes itself
NOT_OF_THE_DEMO = (
    "dataset: none given, and the demo takes no cache, views, encoders, init, given or temporal split; give a dataset"
)

Outline = list[tuple[float, float]]


def _circle(radius: float, corners: int = 32) -> Outline:
    """Return a polygon that looks like a circle around the origin."""
    angles = [2 * math.pi * corner / corners for corner in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


# The polygons of each kind in a square from -1 to 1. A second polygon is a hole.
KINDS: dict[str, list[Outline]] = {
    "plate": [_circle(0.9)],
    "ring": [_circle(0.95), _circle(0.55)],
    "box": [[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]],
    "tent": [[(0, -0.9), (0.95, 0.8), (-0.95, 0.8)]],
    "kite": [[(0, -1), (0.7, -0.1), (0, 1), (-0.7, -0.1)]],
    "bench": [[(-1, -0.4), (1, -0.4), (1, 0.7), (0.6, 0.7), (0.6, 0.1), (-0.6, 0.1), (-0.6, 0.7), (-1, 0.7)]],
}


@dataclass(frozen=True)
class Product:
    """An item. The first seven fields are indices into the tables above."""

    material: int
    colour: int
    kind: int
    pattern: int
    background: int
    brand: int
    occasion: int
    size: int  # half the width of the drawing, in pixels
    left: int  # place of the drawing's centre, in pixels
    top: int

    @property
    def title(self) -> str:
        """Return the title: brand, material, kind and occasion, without colour and pattern."""
        brand, material = BRANDS[self.brand], MATERIALS[self.material]
        return f"{brand} {material} {tuple(KINDS)[self.kind]} for {OCCASIONS[self.occasion]}".capitalize()


def settings(method: str = "iisan") -> dict[str, Any]:
    """Return the training settings for so small a dataset, as sections of RunConfig."""
    if method == NEIGHBOURS:
        return {}
    rates = {group: 1e-4 if group == "encoders" else 1e-3 for group in LEARNING_RATES[method]}
    return {"train": {"max_epochs": 30, "learning_rates": rates}}


def plan(root: Path) -> tuple[Path, list[ViewConfig]]:
    """Return the folder of the demo's dataset under `root`, and its two views, image first. Nothing is written."""
    encoders = root / "encoders"
    views = [
        ViewConfig("image", "image", str(encoders / "image")),
        ViewConfig("title", "title", str(encoders / "text")),
    ]
    return root / "dataset", views


def configure(
    folder: RunFolder,
    options: Mapping[str, Any],
    uncached: bool,
    device: torch.device,
    changes: Mapping[str, Any] = NO_CHANGES,
    ranks: Ranks = ALONE,
) -> RunConfig:
    """Write the demo into the folder, extract its states if the method reads a cache, and return the configuration.

    folder: of the new run; it is claimed, and the demo lies in its folder `demo`. One that a job has begun stays as it
        is.
    options: flat settings, as `run_config` takes them. uncached: run the encoders in every step.
    changes: settings by dotted name, as `run_config` takes them. ranks: those that train; rank 0 writes the demo.
    Raises InputError, before anything is written, for settings that cannot be used.
    """
    config, _ = _configuration(folder.path, options, uncached, changes)
    if isinstance(folder, JobRunFolder) and folder.has_begun:
        return config
    ranks.all_do(lambda: check_new_run(config, folder.path, device))
    LOGGER.info("No dataset given: this is the embedded demo.")
    folder.claim()
    config, views = _configuration(folder.path, options, uncached, changes)  # the folder may have the next number
    ranks.first_does(lambda: _make(folder.path, config, views, device))
    return config


def _make(out: Path, config: RunConfig, views: list[ViewConfig], device: torch.device) -> None:
    """Write the demo into a run's folder, and extract its states if the run reads a cache."""
    write_demo(_home(out))
    if config.cache is not None:
        extract(load_dataset(Path(config.dataset), config.protocol), views, Path(config.cache), device)


def _home(out: Path) -> Path:
    """Return the folder of the demo's dataset, encoders and states in the run's folder."""
    return absolute_path(out) / "demo"


def _configuration(
    out: Path, options: Mapping[str, Any], uncached: bool, changes: Mapping[str, Any]
) -> tuple[RunConfig, list[ViewConfig]]:
    """Return the configuration of a run in the folder `out`, and the views to extract. Raises as `configure` does."""
    split = getattr(options.get("protocol"), "split", options.get("split"))
    split = changes.get("protocol.split", split)
    parts = {name.partition(".")[0] for name in changes}
    if split in ("given", "temporal") or {"cache", "views", "uncached", "init"} & options.keys() or NOT_CHANGED & parts:
        raise InputError(NOT_OF_THE_DEMO)
    home = _home(out)
    dataset, views = plan(home)
    model = {**to_dict(options.get("model", ModelConfig())), **options}
    model |= {name.removeprefix("model."): value for name, value in changes.items() if name.startswith("model.")}
    method = model["method"]
    groups = model["layer_groups"]
    check_choice("method", method, METHODS)
    if groups is not None:
        grouped_layers(ENCODER_SHAPE["num_hidden_layers"], groups)  # before anything is written
    inputs: dict[str, Any] = {"dataset": dataset}
    runs_encoders = uncached or method in TUNING_METHODS
    if not runs_encoders and method != "id":
        views = [replace(view, layer_groups=groups) for view in views]
        inputs |= {"cache": home / "states", "views": [view.name for view in views]}
    encoders = views if runs_encoders else ()
    return run_config({**inputs, **options}, settings(method), encoders=encoders, changes=changes), views


def describe(
    out: Path, options: Mapping[str, Any], uncached: bool, device: torch.device, changes: Mapping[str, Any], table: str
) -> dict[str, Any]:
    """Describe the run that `configure` and training would make in `out`, as `describe_new_run` does.

    The demo is made in a temporary folder, which is removed. Raises InputError as `configure` does.
    """
    RunFolder(out).refuse_if_used()
    with TemporaryDirectory() as name:
        scratch = Path(name).resolve() / "run"
        with RunFolder(scratch) as folder:
            config = configure(folder, options, uncached, device, changes)
        description = describe_new_run(config, scratch, device, table)
    description["files"]["written"].append("demo")
    text = json.dumps(description).replace(json.dumps(str(scratch))[1:-1], json.dumps(str(absolute_path(out)))[1:-1])
    return json.loads(text)


def write_demo(root: Path, seed: int = 0, shuffle_content: bool = False) -> tuple[Path, list[ViewConfig]]:
    """Write root/dataset and root/encoders, and return what `plan` returns.

    shuffle_content: give each item the title and image of a random item and leave the histories as they are, so that
    content predicts nothing.
    """
    generator = np.random.default_rng(seed)
    products = make_products(generator)
    histories = make_histories(products, generator)
    order = generator.permutation(ITEMS) if shuffle_content else np.arange(ITEMS)
    dataset, (image, text) = plan(root)
    with naming(root):
        write_dataset(dataset, [products[index] for index in order], histories)
        write_text_encoder(Path(text.encoder), seed)
        write_image_encoder(Path(image.encoder), seed)
    return dataset, [image, text]


def make_products(generator: np.random.Generator) -> list[Product]:
    """Return ITEMS products in random order, equally many of every pair of material and colour."""
    shelves = [divmod(index % (len(MATERIALS) * len(COLOURS)), len(COLOURS)) for index in range(ITEMS)]
    centre = IMAGE_SIZE // 2
    limits = {
        "kind": (0, len(KINDS)),
        "pattern": (0, len(PATTERNS)),
        "background": (0, len(BACKGROUNDS)),
        "brand": (0, len(BRANDS)),
        "occasion": (0, len(OCCASIONS)),
        "size": (18, 27),
        "left": (centre - 5, centre + 6),
        "top": (centre - 5, centre + 6),
    }
    return [
        Product(*shelves[index], **{name: int(generator.integers(*limit)) for name, limit in limits.items()})
        for index in generator.permutation(ITEMS)
    ]


def make_histories(products: list[Product], generator: np.random.Generator) -> list[list[int]]:
    """Return USERS histories of indices into `products`, oldest first.

    A user starts at a random material and colour, and takes the next material and the next colour with every
    interaction. Among the products of that pair, earlier ones are bought more often. With probability SURPRISE the item
    is any product.
    """
    shelves: dict[tuple[int, int], list[int]] = {}
    for index, product in enumerate(products):
        shelves.setdefault((product.material, product.colour), []).append(index)
    histories = []
    for length in generator.integers(HISTORY_LENGTHS[0], HISTORY_LENGTHS[1] + 1, size=USERS):
        material, colour = generator.integers(len(MATERIALS)), generator.integers(len(COLOURS))
        history = []
        for step in range(length):
            shelf = shelves[(material + step) % len(MATERIALS), (colour + step) % len(COLOURS)]
            candidates = range(ITEMS) if generator.random() < SURPRISE else shelf
            history.append(candidates[int(len(candidates) * generator.random() ** 2)])
        histories.append(history)
    return histories


def write_dataset(folder: Path, products: list[Product], histories: list[list[int]]) -> None:
    """Write items.tsv, users.tsv and images/<item id>.png; line i of items.tsv is products[i]."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    ids = [f"item{index:04d}" for index in range(len(products))]
    _write_table(folder / "items.tsv", ids, [product.title for product in products])
    users = [f"user{index:04d}" for index in range(len(histories))]
    _write_table(folder / "users.tsv", users, [" ".join(ids[index] for index in history) for history in histories])
    for item_id, product in zip(ids, products):
        draw(product).save(images / f"{item_id}.png")


def draw(product: Product) -> Image.Image:
    """Return the picture of a product: RGB, IMAGE_SIZE x IMAGE_SIZE, its kind in its colour and pattern."""
    shape = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    for outline, fill in zip(tuple(KINDS.values())[product.kind], (255, 0)):
        corners = [(product.left + round(product.size * x), product.top + round(product.size * y)) for x, y in outline]
        ImageDraw.Draw(shape).polygon(corners, fill=fill)
    colour = tuple(COLOURS.values())[product.colour]
    surface = Image.new("RGB", shape.size, colour)
    pen = ImageDraw.Draw(surface)
    dark = tuple(channel * 3 // 5 for channel in colour)
    for start in range(0, IMAGE_SIZE, 8):
        if PATTERNS[product.pattern] == "striped":
            pen.rectangle((start, 0, start + 2, IMAGE_SIZE), fill=dark)
        if PATTERNS[product.pattern] == "dotted":
            for top in range(0, IMAGE_SIZE, 8):
                pen.rectangle((start, top, start + 3, top + 3), fill=dark)
    return Image.composite(surface, Image.new("RGB", shape.size, BACKGROUNDS[product.background]), shape)


def write_text_encoder(folder: Path, seed: int) -> None:
    """Write a BERT of random weights whose WordPiece vocabulary is the words of the demo's titles."""
    words = ["for", *BRANDS, *MATERIALS, *KINDS, *OCCASIONS]
    write_bert(folder, {"max_position_embeddings": 32, **ENCODER_SHAPE}, words, seed)


def write_image_encoder(folder: Path, seed: int) -> None:
    """Write a ViT of random weights over 16 patches."""
    write_vit(folder, IMAGE_ENCODER_SHAPE, seed)


def _write_table(path: Path, keys: list[str], values: list[str]) -> None:
    """Write one line a key: the key, a tab, the value."""
    path.write_text("".join(f"{key}\t{value}\n" for key, value in zip(keys, values)), encoding="utf-8", newline="\n")
