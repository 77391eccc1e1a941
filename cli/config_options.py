"""The options --config, --set and --dry-run: settings from a file, settings by dotted name, and a plan of the work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..setting_sources import base_settings, parse_changes
from .help_pages import OUTPUT, SETTINGS, option
from .options import FILE

CONFIG_HELP = (
    "YAML or JSON file of settings, such as a recipe or a run's config.json. It replaces defaults; --set and options "
    "replace it."
)
SET_HELP = (
    "One setting by its dotted name, as model.dropout=0.2 or encoders.title.max_tokens=64; may be repeated. A setting "
    "that an option gives too is an error."
)


def config_options(command: Any) -> Any:
    """Give a command --config, --set and --dry-run."""
    for add_option in (
        option(
            "--dry-run",
            group=OUTPUT,
            is_flag=True,
            help="Check all, print the work, its memory and its files, and write nothing.",
        ),
        option("--set", "changes", group=SETTINGS, multiple=True, metavar="NAME=VALUE", help=SET_HELP),
        option("--config", group=SETTINGS, type=FILE, help=CONFIG_HELP),
    ):
        command = add_option(command)
    return command


def read_config(file: Path | None) -> dict[str, Any] | None:
    """Return the settings in the file of --config, or None if none is given."""
    return None if file is None else base_settings(file)


def chosen_changes(texts: Iterable[str], option_of: Mapping[str, str]) -> dict[str, Any]:
    """Return the changes that the texts of --set ask for, by dotted name.

    option_of: for each setting that an option gives, by dotted name, that option.
    Raises InputError for a text of another form, and for a setting that an option gives too.
    """
    changes = parse_changes(texts)
    for name in changes:
        setting = ".".join(name.split(".")[:2])
        if setting in option_of:
            raise InputError(f"--set {name}, {option_of[setting]}: are one setting; give one of them")
    return changes
