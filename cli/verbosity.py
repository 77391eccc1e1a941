"""The options --quiet and --verbose, which choose how much a command writes on standard error."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import click

from ..errors import InputError
from ..printable import printable
from .help_pages import OUTPUT, option

LIBRARY = "iisan_fast"
CHOSEN = f"{__name__}.chosen"  # the key, in a click context, of the option that was given


def show_normal() -> None:
    """Show the library's own messages and progress, and the warnings of other libraries."""
    _set_levels(logging.INFO, logging.WARNING)


def show_errors() -> None:
    """Show errors alone: no progress, messages or warnings."""
    _set_levels(logging.ERROR, logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # read when transformers is imported, which is later
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def show_all() -> None:
    """Show what is chosen and why, and what other libraries log."""
    _set_levels(logging.DEBUG, logging.INFO)
    os.environ["TRANSFORMERS_VERBOSITY"] = "info"


def verbosity_options(command: Any) -> Any:
    """Give a command --quiet and --verbose. Both act as soon as they are read, and pass no value on."""
    for flags, text in (
        (("-v", "--verbose"), "Print what is chosen and why (device, precision), and the logs of other libraries."),
        (("-q", "--quiet"), "Print errors and the result alone: no progress, no messages."),
    ):
        add_option = option(
            *flags, group=OUTPUT, help=text, callback=_choose, is_flag=True, expose_value=False, is_eager=True
        )
        command = add_option(command)
    return command


def report(text: str) -> None:
    """Write a line of progress on standard error, unless the command is quiet."""
    if logging.getLogger(LIBRARY).isEnabledFor(logging.INFO):
        sys.stderr.write(f"{printable(text)}\n")


def _choose(context: click.Context, parameter: click.Parameter, is_given: bool) -> None:
    """Set the verbosity for --quiet or --verbose. Raises InputError if both are given."""
    if not is_given or context.resilient_parsing:
        return
    if context.meta.setdefault(CHOSEN, parameter.name) != parameter.name:
        raise InputError("--quiet, --verbose: give one of them")
    if parameter.name == "quiet":
        show_errors()
    else:
        show_all()


def _set_levels(library: int, others: int) -> None:
    """Set the level of this library's log, and that of all other libraries."""
    logging.getLogger(LIBRARY).setLevel(library)
    logging.getLogger().setLevel(others)
