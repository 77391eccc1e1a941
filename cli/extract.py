"""iisan-fast extract: a catalogue's hidden states into a cache."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import click

from ..config import ENCODER_DTYPES, POOLINGS, STORE_DTYPES, ProtocolConfig, ViewConfig, from_dict
from ..errors import InputError
from ..sequences import load_dataset
from .options import FOLDER, device_option, json_option, protocol_options, torch_device
from .output import print_counts, print_json

VIEW_HELP = """A view as "source=title encoder=E", optionally with name=, pooling=, layers=0,2,4, max_tokens= and
encoder_dtype=; may be repeated. The first view takes the image's role."""


@click.command()
@click.argument("dataset", type=FOLDER)
@click.option("--cache", type=FOLDER, required=True, help="Folder of the hidden states; made where there is none.")
@click.option("--image-encoder", help="Hub name or folder of a vision encoder.")
@click.option("--image-pooling", type=click.Choice(POOLINGS), help="[the encoder family's default]")
@click.option("--image-layers", help="Kept hidden states, as 0,2,4. [0, 2, 4, … to the last]")
@click.option("--text-encoder", help="Hub name or folder of a text encoder.")
@click.option("--text-source", type=click.Choice(["title", "caption"]), default="title", help="What it reads.")
@click.option("--text-pooling", type=click.Choice(POOLINGS), help="[the encoder family's default]")
@click.option("--text-layers", help="Kept hidden states, as 0,2,4. [0, 2, 4, … to the last]")
@click.option("--max-tokens", type=int, default=30, help="Tokens of a text that are read.")
@click.option("--encoder-dtype", type=click.Choice(ENCODER_DTYPES), default="auto", help="auto: bfloat16 on CUDA.")
@click.option("--view", "view_texts", multiple=True, help=VIEW_HELP)
@click.option("--dtype", type=click.Choice(STORE_DTYPES), default="bfloat16", help="What the states are stored in.")
@click.option("--raw-titles", is_flag=True, help="Leave HTML entities in titles and captions as they are.")
@click.option(
    "--missing-images",
    type=click.Choice(["error", "blank"]),
    default="error",
    help="What to do about images that are missing or cannot be read.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, help="Items encoded at a time.")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Processes that read images ahead of the encoder; 0: none. [as idle CPUs and images suggest]",
)
@protocol_options
@device_option
@json_option
def extract(
    dataset: Path,
    cache: Path,
    view_texts: tuple[str, ...],
    dtype: str,
    raw_titles: bool,
    missing_images: str,
    batch_size: int,
    workers: int | None,
    min_interactions: int,
    max_inputs: int,
    device: str,
    as_json: bool,
    **shorthand,
) -> None:
    """Run DATASET's items through frozen encoders and keep their pooled hidden states in --cache.

    A stopped extraction goes on where it stopped; only new or changed items are encoded again.
    """
    views = [*_shorthand_views(**shorthand), *map(_parse_view, view_texts)]
    if not views:
        raise InputError("no view: give --text-encoder, --image-encoder or --view")
    names = [view.name for view in views]
    if len(set(names)) < len(names):
        raise InputError(f"two views of one name ({', '.join(names)}): give each --view its own name=")
    data = load_dataset(dataset, ProtocolConfig(min_interactions, max_inputs, unescape_titles=not raw_titles))
    from .. import extract as extraction  # imports transformers, which takes seconds

    results = extraction.extract(data, views, cache, torch_device(device), batch_size, dtype, missing_images, workers)
    if as_json:
        print_json([dataclasses.asdict(result) for result in results])
        return
    print_counts(
        str(cache),
        {
            f"{result.view}: {result.items:,} items": f"{result.encoded:,} encoded"
            + (f", {result.blank:,} of them blank" if result.blank else "")
            for result in results
        },
    )


def _shorthand_views(
    image_encoder: str | None,
    image_pooling: str | None,
    image_layers: str | None,
    text_encoder: str | None,
    text_source: str,
    text_pooling: str | None,
    text_layers: str | None,
    max_tokens: int,
    encoder_dtype: str,
) -> list[ViewConfig]:
    views = []
    if image_encoder:
        layers = _layers(image_layers, "--image-layers")
        views.append(ViewConfig("image", "image", image_encoder, image_pooling, layers, max_tokens, encoder_dtype))
    if text_encoder:
        layers = _layers(text_layers, "--text-layers")
        views.append(
            ViewConfig(text_source, text_source, text_encoder, text_pooling, layers, max_tokens, encoder_dtype)
        )
    return views


def _parse_view(text: str) -> ViewConfig:
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--view {text!r}: {error}") from None
    values: dict = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--view {text!r}: expected key=value, found {part!r}")
        values[key] = value
    if "layers" in values:
        values["layers"] = _layers(values["layers"], f"--view {text!r}")
    if "max_tokens" in values:
        values["max_tokens"] = _integer(values["max_tokens"], f"--view {text!r}: max_tokens")
    if "name" not in values and "source" in values:
        values["name"] = "-".join(values[key] for key in ("source", "pooling") if key in values)
    try:
        return from_dict(ViewConfig, values)
    except InputError as error:
        raise InputError(f"--view {text!r}: {error}") from None


def _layers(text: str | None, where: str) -> tuple[int, ...] | None:
    return None if text is None else tuple(_integer(part, f"{where}: layers") for part in text.split(","))


def _integer(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{where}: expected whole numbers, found {text!r}") from None
