"""iisan-fast extract: hidden states of a catalogue into a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ..config import ExtractionConfig, ProtocolConfig
from .help_pages import DATA, ENCODERS, command, option
from .options import FOLDER, device_option, output_options, protocol_options
from .output import print_counts, print_json
from .setting_options import given_settings, setting_options
from .views import encoder_settings, view_options

EXAMPLES = (
    "iisan-fast extract DATASET --cache STATES \\\n"
    "  --image-encoder google/vit-base-patch16-224 --text-encoder bert-base-uncased",
    "iisan-fast extract DATASET --cache STATES --batch-size 16 \\\n"
    '  --view "source=title encoder=sentence-transformers/all-MiniLM-L6-v2 pooling=mean"',
)


@command(examples=EXAMPLES, short_help="Store the hidden states of frozen encoders in a cache.")
@click.argument("dataset", type=FOLDER)
@option("--cache", group=DATA, type=FOLDER, required=True, help="Folder of the hidden states, made if it is missing.")
@protocol_options
@view_options
@setting_options(ExtractionConfig, ENCODERS)
@device_option
@output_options
def extract(dataset: Path, cache: Path, device: str, as_json: bool, **options: Any) -> None:
    """Run DATASET's items through frozen encoders and store their pooled hidden states in a cache.

    A stopped extraction goes on where it stopped; only new or changed items are encoded again.
    """
    from .. import api  # imports numpy

    encoders, views = encoder_settings(options)
    settings = given_settings(options, ProtocolConfig) | given_settings(options, ExtractionConfig)
    results = api.extract(dataset, cache, views=views, device=device, **encoders, **settings)
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
