"""Options and value types that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..config import ATTENTIONS, MISSING_CAPTIONS, MISSING_IMAGES, SPLITS, ProtocolConfig
from ..errors import InputError
from ..settings import changed_section

FOLDER = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
device_option = click.option("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:N.")
attention_option = click.option(
    "--attention",
    type=click.Choice(ATTENTIONS),
    help="How encoders compute attention. [auto: xformers on CUDA where it is installed, else torch's (sdpa)]",
)
missing_images_option = click.option(
    "--missing-images",
    type=click.Choice(MISSING_IMAGES),
    help="What to do about images that are missing or cannot be read. [error]",
)
missing_captions_option = click.option(
    "--missing-captions",
    type=click.Choice(MISSING_CAPTIONS),
    help="What to do about items without a caption, if others have one: stop, or take their title. [error]",
)
k_option = click.option("--k", "ks", type=int, multiple=True, help="A cut-off of HR and NDCG; may be repeated. [10]")


def writable_file(_context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """A callback of options that take a file to be written: refused before the work rather than after it."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise InputError(f"{parameter.opts[0]}: expected a file in a folder that exists, found {file}")
    return file


out_option = click.option("--out", type=FOLDER, callback=writable_file, help="A JSON file for the result.")


PROTOCOL_OPTIONS = {
    "min_interactions": click.option("--min-interactions", type=int, help="Users with fewer are dropped. [5]"),
    "max_inputs": click.option("--max-inputs", type=int, help="Items a history feeds in. [10]"),
    "split": click.option(
        "--split",
        type=click.Choice(SPLITS),
        help="What is held out: each user's last two, or what comes after two times of all (DATASET's times.tsv). "
        "[leave-one-out]",
    ),
    "validation_from": click.option(
        "--validation-from", type=float, help="Temporal: share of the interactions before validation. [0.8]"
    ),
    "test_from": click.option("--test-from", type=float, help="Temporal: share before the test. [0.9]"),
}


def protocol_options(command):
    """Add the options of the data protocol: which interactions count, and what is held out."""
    for option in reversed(PROTOCOL_OPTIONS.values()):
        command = option(command)
    return command


def protocol_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Take the protocol's options out of `options` and return those that are given."""
    taken = {name: options.pop(name) for name in PROTOCOL_OPTIONS}
    return {name: value for name, value in taken.items() if value is not None}


def chosen_protocol(options: dict[str, Any]) -> ProtocolConfig:
    """Take the protocol's options out of `options` and return the protocol they describe."""
    return changed_section("protocol", ProtocolConfig, None, protocol_settings(options))
