"""Options and value types that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..config import ProtocolConfig
from ..errors import InputError
from ..settings import changed_section
from .help_pages import DATA, OUTPUT, option
from .setting_options import given_settings, setting_options
from .verbosity import verbosity_options

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)

device_option = option(
    "--device",
    group=OUTPUT,
    default="auto",
    metavar="NAME",
    help="Device that computes: cpu, cuda, cuda:N, or auto (CUDA if there is one).",
)
protocol_options = setting_options(ProtocolConfig, DATA)
json_option = option("--json", "as_json", group=OUTPUT, is_flag=True, help="Print the figures as JSON.")


def output_options(command: Any) -> Any:
    """Give a command --json, --quiet and --verbose."""
    return json_option(verbosity_options(command))


def writable_file(_context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """Return an option's file if it can be written. Raises InputError, before any work is done, if it cannot."""
    if file is not None and not file.absolute().parent.is_dir():
        raise InputError(f"{parameter.opts[0]}: expected a file in a folder that exists, found {file}")
    return file


out_option = option("--out", group=OUTPUT, type=FILE, callback=writable_file, help="JSON file for the result.")


def chosen_protocol(options: dict[str, Any]) -> ProtocolConfig:
    """Take the protocol's options out of `options` and return the protocol they describe."""
    return changed_section("protocol", ProtocolConfig, None, given_settings(options, ProtocolConfig))
