"""iisan-fast caption: captions for the images or video frames of a catalogue."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ..captioning import CaptionSettings
from ..devices import torch_device
from .help_pages import DATA, ENCODERS, command, option
from .options import FOLDER, chosen_protocol, device_option, output_options, protocol_options
from .output import print_counts, print_json
from .setting_options import given_settings, setting_options

EXAMPLES = (
    "iisan-fast caption DATASET --model Salesforce/blip-image-captioning-base",
    "iisan-fast caption DATASET --model llava-hf/llava-onevision-qwen2-0.5b-ov-hf \\\n"
    "  --frames VIDEO-FRAMES --frames-per-item 4",
)


@command(examples=EXAMPLES, short_help="Write captions of the images into captions.tsv.")
@click.argument("dataset", type=FOLDER)
@option("--model", group=ENCODERS, required=True, help="Hub name or folder of an image-text-to-text model.")
@option(
    "--frames", group=DATA, type=FOLDER, help="Folder of video frames, <item_id>/*.jpg, in place of DATASET's images."
)
@protocol_options
@setting_options(CaptionSettings, ENCODERS)
@device_option
@output_options
def caption(dataset: Path, model: str, frames: Path | None, device: str, as_json: bool, **options: Any) -> None:
    """Write a caption into DATASET's captions.tsv for every item that has none.

    A stopped run goes on where it stopped. Captions that are already in the file stay.
    """
    from .. import captioning  # imports transformers, which takes seconds

    protocol = chosen_protocol(options)
    settings = CaptionSettings(**given_settings(options, CaptionSettings))
    result = captioning.caption(dataset, model, torch_device(device), settings, frames, protocol)
    counts = dataclasses.asdict(result)
    if as_json:
        print_json(counts)
    else:
        print_counts(str(dataset / "captions.tsv"), {name: f"{count:,}" for name, count in counts.items()})
