"""Options that say which views a command encodes, and by which encoders."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

import click

from ..config import ENCODER_DTYPES, POOLINGS, ViewConfig
from ..errors import InputError
from ..setting_fields import from_dict
from ..settings import take_views

VIEW_HELP = """A view as "source=title encoder=E", optionally with name=, pooling=, layers=0,2,4, layer_groups=,
max_tokens=, encoder_dtype= and option.NAME=; may be repeated. The first view takes the image's role."""
OPTION_HELP = """NAME=VALUE for Hugging Face to load the encoders by, as device_map=auto; text:NAME=VALUE or
image:NAME=VALUE for one of them; may be repeated. A VALUE may be JSON."""

OPTIONS = (
    click.option("--image-encoder", help="Hub name or folder of a vision encoder."),
    click.option("--image-pooling", type=click.Choice(POOLINGS), help="[the encoder family's default]"),
    click.option("--image-layers", help="Kept hidden states, as 0,2,4. [0, 2, 4, … to the last]"),
    click.option("--text-encoder", help="Hub name or folder of a text encoder."),
    click.option("--text-source", type=click.Choice(["title", "caption"]), help="What it reads. [title]"),
    click.option("--text-pooling", type=click.Choice(POOLINGS), help="[the encoder family's default]"),
    click.option("--text-layers", help="Kept hidden states, as 0,2,4. [0, 2, 4, … to the last]"),
    click.option("--max-tokens", type=int, help="Tokens of a text that are read. [30]"),
    click.option("--encoder-dtype", type=click.Choice(ENCODER_DTYPES), help="[auto: bfloat16 on CUDA]"),
    click.option("--encoder-option", "encoder_options", multiple=True, help=OPTION_HELP),
    click.option("--view", "view_texts", multiple=True, help=VIEW_HELP),
)
SETTINGS = (
    *("image_encoder", "image_pooling", "image_layers", "text_encoder", "text_source", "text_pooling", "text_layers"),
    *("max_tokens", "encoder_dtype"),
)
INTEGERS = ("max_tokens", "layer_groups")
OPTION = "option."


def view_options(command):
    """All of them."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def encoder_settings(options: dict[str, Any]) -> tuple[dict[str, Any], list[ViewConfig]]:
    """Take the options of encoders out of `options`; return them as flat settings, and the views of --view."""
    views = [parsed_view(text) for text in options.pop("view_texts")]
    settings = {name: value for name in SETTINGS if (value := options.pop(name)) is not None}
    for name in ("image_layers", "text_layers"):
        if name in settings:
            settings[name] = _layers(settings[name], f"--{name.replace('_', '-')}")
    settings |= _loading_options(options.pop("encoder_options"))
    return settings, views


def chosen_views(options: dict[str, Any], layer_groups: int | None = None) -> list[ViewConfig]:
    """Take the options of encoders out of `options` and return the views they describe, as `take_views` does."""
    settings, views = encoder_settings(options)
    return take_views(settings, views, layer_groups)


def parsed_view(text: str) -> ViewConfig:
    """A view as --view writes it."""
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--view {text!r}: {error}") from None
    values: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--view {text!r}: expected key=value, found {part!r}")
        if key.startswith(OPTION):
            values.setdefault("options", {})[key.removeprefix(OPTION)] = _json_or_text(value)
        else:
            values[key] = value
    if "layers" in values:
        values["layers"] = _layers(values["layers"], f"--view {text!r}: layers")
    for name in INTEGERS:
        if name in values:
            values[name] = _integer(values[name], f"--view {text!r}: {name}")
    if "name" not in values and "source" in values:
        values["name"] = "-".join(values[key] for key in ("source", "pooling") if key in values)
    try:
        return from_dict(ViewConfig, values)
    except InputError as error:
        raise InputError(f"--view {text!r}: {error}") from None


def _loading_options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return image_options, text_options and encoder_options, those of both, from the texts of --encoder-option."""
    settings: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        kind, _, option = name.rpartition(":")
        if not (option and equals and kind in ("", "image", "text")):
            raise InputError(f"--encoder-option: expected NAME=VALUE, or that after image: or text:, found {text!r}")
        settings.setdefault(f"{kind or 'encoder'}_options", {})[option] = _json_or_text(value)
    return settings


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _layers(text: str, where: str) -> tuple[int, ...]:
    return tuple(_integer(part, where) for part in text.split(","))


def _integer(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{where}: expected whole numbers, found {text!r}") from None
