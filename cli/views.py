"""Options that say which views a command encodes, and by which encoders."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from ..config import ENCODER_DTYPES, POOLINGS, ViewConfig, from_dict
from ..errors import InputError

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
INTEGERS = ("max_tokens", "layer_groups")
OPTION = "option."


def view_options(command):
    """All of them."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def chosen_views(options: dict[str, Any], layer_groups: int | None = None) -> list[ViewConfig]:
    """The views that a command's options ask for; takes them out of `options`. layer_groups: of all views, which then
    may have no layers of their own."""
    texts, loading = options.pop("view_texts"), _loading_options(options.pop("encoder_options"))
    common = {name: options.pop(name) for name in ("max_tokens", "encoder_dtype")}
    common = {name: value for name, value in common.items() if value is not None}
    source = options.pop("text_source")
    views = []
    for kind, name in (("image", "image"), ("text", source or "title")):
        encoder, pooling, layers = (options.pop(f"{kind}_{part}") for part in ("encoder", "pooling", "layers"))
        if encoder:
            kept = None if layers is None else _layers(layers, f"--{kind}-layers")
            own = {**loading.get("", {}), **loading.get(kind, {})}
            views.append(ViewConfig(name, name, encoder, pooling, kept, options=own, **common))
        elif pooling or layers is not None or kind in loading:
            settings = f"--{kind}-pooling, --{kind}-layers, --encoder-option {kind}:NAME=VALUE"
            raise InputError(f"{settings}: they need --{kind}-encoder")
    if (common or source) and not views:
        raise InputError("--max-tokens, --encoder-dtype, --text-source: need --image-encoder or --text-encoder")
    if loading and not views:
        raise InputError("--encoder-option: needs --image-encoder or --text-encoder; --view has option.NAME=VALUE")
    views += map(parsed_view, texts)
    if layer_groups is not None:
        views = [_grouped(view, layer_groups) for view in views]
    names = [view.name for view in views]
    if len(set(names)) < len(names):
        raise InputError(f"two views of one name ({', '.join(names)}): give each --view its own name=")
    return views


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
    """{"image", "text" or "" for both: {name: value}}."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        kind, _, own = name.rpartition(":")
        if not (own and equals and kind in ("", "image", "text")):
            raise InputError(f"--encoder-option: expected NAME=VALUE, or that after image: or text:, found {text!r}")
        found.setdefault(kind, {})[own] = _json_or_text(value)
    return found


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _grouped(view: ViewConfig, groups: int) -> ViewConfig:
    if view.layers is not None or view.layer_groups is not None:
        raise InputError(f"--layer-groups: view {view.name!r} has layers of its own; give one or the other")
    return replace(view, layer_groups=groups)


def _layers(text: str, where: str) -> tuple[int, ...]:
    return tuple(_integer(part, where) for part in text.split(","))


def _integer(text: str, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{where}: expected whole numbers, found {text!r}") from None
