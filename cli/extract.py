"""iisan-fast extract: a catalogue's hidden states into a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ..config import STORE_DTYPES
from ..data import load_dataset
from ..errors import InputError
from .options import (
    FOLDER,
    attention_option,
    chosen_protocol,
    device_option,
    json_option,
    missing_captions_option,
    missing_images_option,
    protocol_options,
    torch_device,
)
from .output import print_counts, print_json
from .views import chosen_views, view_options


@click.command()
@click.argument("dataset", type=FOLDER)
@click.option("--cache", type=FOLDER, required=True, help="Folder of the hidden states; made where there is none.")
@view_options
@click.option(
    "--layer-groups", type=int, help="Blocks kept of each encoder, evenly spread, the last one among them. [layers]"
)
@click.option("--dtype", type=click.Choice(STORE_DTYPES), default="bfloat16", help="What the states are stored in.")
@click.option("--raw-titles", is_flag=True, help="Leave HTML entities in titles and captions as they are.")
@missing_images_option
@missing_captions_option
@click.option("--batch-size", type=click.IntRange(min=1), default=64, help="Items encoded at a time.")
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    help="Processes that read images ahead of the encoder; 0: none. [as idle CPUs and images suggest]",
)
@protocol_options
@attention_option
@device_option
@json_option
def extract(
    dataset: Path,
    cache: Path,
    layer_groups: int | None,
    dtype: str,
    raw_titles: bool,
    missing_images: str | None,
    missing_captions: str | None,
    attention: str | None,
    batch_size: int,
    workers: int | None,
    device: str,
    as_json: bool,
    **options,
) -> None:
    """Run DATASET's items through frozen encoders and keep their pooled hidden states in --cache.

    A stopped extraction goes on where it stopped; only new or changed items are encoded again.
    """
    views = chosen_views(options, layer_groups)
    if not views:
        raise InputError("no view: give --text-encoder, --image-encoder or --view")
    protocol = chosen_protocol(options, unescape_titles=not raw_titles, missing_captions=missing_captions or "error")
    data = load_dataset(dataset, protocol)
    from .. import states  # imports transformers, which takes seconds

    results = states.extract(
        data,
        views,
        cache,
        torch_device(device),
        batch_size,
        dtype,
        missing_images or "error",
        workers,
        attention or "auto",
    )
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
