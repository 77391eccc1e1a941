"""iisan-fast extract: a catalogue's hidden states into a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from .. import api
from ..config import STORE_DTYPES
from .options import (
    FOLDER,
    attention_option,
    device_option,
    json_option,
    missing_captions_option,
    missing_images_option,
    protocol_options,
    protocol_settings,
)
from .output import print_counts, print_json
from .views import encoder_settings, view_options


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
    settings, views = encoder_settings(options)
    results = api.extract(
        dataset,
        cache,
        views=views,
        layer_groups=layer_groups,
        dtype=dtype,
        missing_images=missing_images or "error",
        batch_size=batch_size,
        workers=workers,
        attention=attention or "auto",
        device=device,
        unescape_titles=not raw_titles,
        missing_captions=missing_captions or "error",
        **settings,
        **protocol_settings(options),
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
