"""iisan-fast caption: captions of a catalogue's images or video frames."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ..captioning import MISSING_PICTURES
from ..config import ENCODER_DTYPES
from ..devices import torch_device
from .options import FOLDER, chosen_protocol, device_option, json_option, protocol_options
from .output import print_counts, print_json

SIZE = click.IntRange(min=1)


@click.command()
@click.argument("dataset", type=FOLDER)
@click.option("--model", required=True, help="Hub name or folder of an image-text-to-text model.")
@click.option("--prompt", help="What it is asked; without a chat template, goes on from. [a description; nothing]")
@click.option("--frames", type=FOLDER, help="A folder of video frames, <item_id>/*.jpg, in place of DATASET's images.")
@click.option("--frames-per-item", type=SIZE, default=4, help="Of its frames, evenly spread, in one prompt.")
@click.option("--max-tokens", type=SIZE, default=64, help="Of a caption.")
@click.option("--batch-size", type=SIZE, default=8, help="Items captioned at a time.")
@click.option("--dtype", type=click.Choice(ENCODER_DTYPES), default="auto", help="auto: bfloat16 on CUDA.")
@click.option(
    "--missing-images",
    type=click.Choice(MISSING_PICTURES),
    default="error",
    help="What to do about items whose images are missing or cannot be read.",
)
@click.option(
    "--workers", type=click.IntRange(min=0), help="Processes that check the images. [as idle CPUs and images suggest]"
)
@protocol_options
@device_option
@json_option
def caption(dataset: Path, device: str, as_json: bool, **options: Any) -> None:
    """Write a caption into DATASET's captions.tsv for every item that has none.

    A stopped run goes on where it stopped. Captions that stand there already, made by hand or otherwise, stay.
    """
    from .. import captioning  # imports transformers, which takes seconds

    protocol = chosen_protocol(options)
    counts = dataclasses.asdict(captioning.caption(dataset, device=torch_device(device), protocol=protocol, **options))
    if as_json:
        print_json(counts)
    else:
        print_counts(str(dataset / "captions.tsv"), {name: f"{count:,}" for name, count in counts.items()})
