"""Options that commands share which train several runs."""

from __future__ import annotations

from typing import Any

import click

from ..config import PLACEMENTS, ExtractionConfig, ViewConfig
from ..errors import InputError
from .help_pages import ENCODERS
from .options import FOLDER
from .setting_options import setting_options
from .views import chosen_views, parsed_view, view_options

SIZE = click.IntRange(min=1)
OPTIONS = (
    click.option("--folder", type=FOLDER, required=True, help="Where the runs lie; a stopped sweep goes on there."),
    click.option("--seeds", default="0", help="As 0,1,2."),
    click.option("--epochs", type=SIZE, default=100, help="At most."),
    click.option("--patience", type=click.IntRange(min=0), default=10, help="As of train."),
    click.option("--batch-users", type=SIZE, default=64, help="Users a step, of every method."),
    click.option("--users", type=SIZE, help="Users drawn of the dataset, for every run. [all]"),
    view_options,
    click.option(
        "--pair",
        "pairs",
        multiple=True,
        help='A named set of encoders: "NAME: VIEW; VIEW", each as of --view; may be repeated.',
    ),
    click.option("--table", type=click.Choice(PLACEMENTS), default="auto", help="As of train."),
    setting_options(ExtractionConfig, ENCODERS, without=("dtype", "layer_groups", "batch_size", "workers")),
)


def sweep_options(command):
    """All of them."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def said(options: dict[str, Any]) -> dict[str, Any]:
    """The options by their names on the command line; where the runs lie is left out."""
    names = {"view_texts": "view", "pairs": "pair"}
    return {names.get(name, name): value for name, value in {**options, "folder": "FOLDER"}.items()}


def sweep_settings(options: dict[str, Any], methods: tuple[str, ...]):
    """The SweepSettings that the options ask for."""
    encoders = _encoders(options)
    from ..benchmarks.cells import SweepSettings  # imports torch, which takes seconds

    return SweepSettings(
        methods=methods,
        encoders=encoders,
        seeds=numbers("--seeds", options["seeds"], int),
        missing_images=options["missing_images"] or "error",
        attention=options["attention"] or "auto",
        **{name: options[name] for name in ("epochs", "patience", "batch_users", "users", "table")},
    )


def numbers(option: str, text: str, kind: type) -> tuple:
    """Numbers with commas between them."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option}: expected numbers with commas between them, found {text!r}") from None


def _encoders(options: dict[str, Any]) -> dict[str, tuple[ViewConfig, ...]]:
    """The named sets of views that the options ask for; one set has no need of a name."""
    views, found = chosen_views(options), {}
    for text in options.pop("pairs"):
        name, _, parts = text.partition(":")
        if not name.strip() or not parts.strip() or name.strip() in found:
            raise InputError(f"--pair {text!r}: expected a name of its own, a colon, and views with ; between them")
        found[name.strip()] = tuple(parsed_view(part) for part in parts.split(";"))
    if views and found:
        raise InputError("--pair: leave out --view, --image-encoder and --text-encoder, or give them as a pair too")
    if not views and not found:
        raise InputError("no encoders: give --text-encoder, --image-encoder, --view or --pair")
    return found or {"encoders": tuple(views)}
