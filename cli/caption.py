"""iisan-fast caption: captions for the images or video frames of a catalogue."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ..captioning import MISSING_PICTURES
from ..config import ENCODER_DTYPES
from ..devices import torch_device
from .help_pages import DATA, ENCODERS, command, option
from .options import FOLDER, chosen_protocol, device_option, output_options, protocol_options
from .output import print_counts, print_json

SIZE = click.IntRange(min=1)


EXAMPLES = (
    "iisan-fast caption DATASET --model Salesforce/blip-image-captioning-base",
    "iisan-fast caption DATASET --model llava-hf/llava-onevision-qwen2-0.5b-ov-hf \\\n"
    "  --frames VIDEO-FRAMES --frames-per-item 4",
)


@command(examples=EXAMPLES, short_help="Write captions of the images into captions.tsv.")
@click.argument("dataset", type=FOLDER)
@option("--model", group=ENCODERS, required=True, help="Hub name or folder of an image-text-to-text model.")
@option(
    "--prompt",
    group=ENCODERS,
    help="Question to a model that chats, or the beginning of a caption for another model.  [default: a request for a "
    "description; nothing]",
)
@option(
    "--frames", group=DATA, type=FOLDER, help="Folder of video frames, <item_id>/*.jpg, in place of DATASET's images."
)
@option("--frames-per-item", group=DATA, type=SIZE, default=4, help="Frames of an item, evenly spread, in one prompt.")
@option("--max-tokens", group=ENCODERS, type=SIZE, default=64, help="Tokens of a caption at most.")
@option("--batch-size", group=ENCODERS, type=SIZE, default=8, help="Items that are captioned at a time.")
@option(
    "--dtype",
    group=ENCODERS,
    type=click.Choice(ENCODER_DTYPES),
    default="auto",
    help="Data type of the model's weights; auto is bfloat16 on CUDA, else float32.",
)
@option(
    "--missing-images",
    group=DATA,
    type=click.Choice(MISSING_PICTURES),
    default="error",
    help="For images that are missing or cannot be read: stop with an error, or skip the items.",
)
@option(
    "--workers",
    group=DATA,
    type=click.IntRange(min=0),
    help="Processes that check the images; 0 is none.  [default: by idle CPUs and the number of images]",
)
@protocol_options
@device_option
@output_options
def caption(dataset: Path, device: str, as_json: bool, **options: Any) -> None:
    """Write a caption into DATASET's captions.tsv for every item that has none.

    A stopped run goes on where it stopped. Captions that are already in the file stay.
    """
    from .. import captioning  # imports transformers, which takes seconds

    protocol = chosen_protocol(options)
    counts = dataclasses.asdict(captioning.caption(dataset, device=torch_device(device), protocol=protocol, **options))
    if as_json:
        print_json(counts)
    else:
        print_counts(str(dataset / "captions.tsv"), {name: f"{count:,}" for name, count in counts.items()})
