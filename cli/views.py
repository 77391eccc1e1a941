"""Options that say which views a command encodes, and by which encoders."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import FeaturesConfig, ViewConfig
from ..errors import InputError
from ..setting_fields import same_setting, setting
from ..setting_sources import view_from_values
from ..settings import take_views
from .help_pages import ENCODERS, option
from .setting_options import Spelling, given_settings, json_or_text, setting_options

ENCODER_OPTION = "[image:|text:]NAME=VALUE"
SPELLINGS = {"encoder_options": Spelling("--encoder-option", ENCODER_OPTION)}
INTEGERS = ("max_tokens", "layer_groups", "first_id")
LOADING_OPTION = "option."  # stands before the name of an option of from_pretrained

view_option = option(
    "--view",
    "view_texts",
    group=ENCODERS,
    multiple=True,
    metavar="TEXT",
    help='A view as "source=title encoder=E" (name=, pooling=, layers=0,2, …) or "source=features path=F" (name=, '
    "ids=, first_id=, …); the first one takes the image's role.",
)


@dataclass(frozen=True)
class EncoderOptions:
    """An image encoder and a text encoder, a view each."""

    image_encoder: str | None = setting(None, help="Hub name or folder of a vision encoder.")
    image_pooling: str | None = same_setting(ViewConfig, "pooling")
    image_layers: tuple[int, ...] | None = same_setting(ViewConfig, "layers")
    image_revision: str | None = same_setting(ViewConfig, "revision")
    text_encoder: str | None = setting(None, help="Hub name or folder of a text encoder.")
    text_source: str | None = setting(
        None, help="Text that the text encoder reads.", choices=("title", "caption"), automatic="title"
    )
    text_pooling: str | None = same_setting(ViewConfig, "pooling")
    text_layers: tuple[int, ...] | None = same_setting(ViewConfig, "layers")
    text_revision: str | None = same_setting(ViewConfig, "revision")
    revision: str | None = same_setting(ViewConfig, "revision")
    max_tokens: int = same_setting(ViewConfig, "max_tokens")
    encoder_dtype: str = same_setting(ViewConfig, "encoder_dtype")
    encoder_options: Mapping[str, Any] = setting(
        {},
        help="Option for Hugging Face to load the encoders by, as device_map=auto; for one of them after image: or "
        "text:. May be repeated. A VALUE may be JSON.",
    )
    trust_remote_code: bool = same_setting(ViewConfig, "trust_remote_code")


def view_options(command: Any) -> Any:
    """Give a command the options of encoders."""
    return setting_options(EncoderOptions, ENCODERS, spellings=SPELLINGS)(view_option(command))


def encoder_settings(options: dict[str, Any]) -> tuple[dict[str, Any], list[ViewConfig | FeaturesConfig]]:
    """Take the options of encoders out of `options`; return them as flat settings, and the views of --view.

    Raises InputError, with the option's text, for a --view or an --encoder-option that cannot be read.
    """
    views = [parsed_view(text) for text in options.pop("view_texts")]
    settings = given_settings(options, EncoderOptions, spellings=SPELLINGS)
    return settings | _loading_options(settings.pop("encoder_options", {})), views


def chosen_views(options: dict[str, Any], layer_groups: int | None = None) -> list[ViewConfig]:
    """Take the options of encoders out of `options` and return the views they describe, as `take_views` does.

    Raises InputError for a view of features, which has no encoder.
    """
    settings, described = encoder_settings(options)
    for view in described:
        if isinstance(view, FeaturesConfig):
            raise InputError(f"--view: {view.name}: features are ready-made, and have no encoder; name an encoder")
    views = [view for view in described if isinstance(view, ViewConfig)]
    return take_views(settings, views, layer_groups)


def parsed_view(text: str) -> ViewConfig | FeaturesConfig:
    """Return the view that the text of a --view describes. Raises InputError, with the text, if it describes none."""
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--view {text!r}: {error}") from None
    values: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--view {text!r}: expected key=value, found {part!r}")
        if key.startswith(LOADING_OPTION):
            values.setdefault("options", {})[key.removeprefix(LOADING_OPTION)] = json_or_text(value)
        else:
            values[key] = value
    if "layers" in values:
        where = f"--view {text!r}: layers"
        values["layers"] = tuple(_integer(number, where) for number in values["layers"].split(","))
    for name in INTEGERS:
        if name in values:
            values[name] = _integer(values[name], f"--view {text!r}: {name}")
    if "trust_remote_code" in values:
        values["trust_remote_code"] = json_or_text(values["trust_remote_code"])
    try:
        return view_from_values(values)
    except InputError as error:
        raise InputError(f"--view {text!r}: {error}") from None


def places_of_features(texts: tuple[str, ...]) -> dict[str, str]:
    """Return the file of each view in texts VIEW=FILE. Raises InputError for another text, or a view named twice."""
    places: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise InputError(f"--features: expected VIEW=FILE, found {text!r}")
        if name in places:
            raise InputError(f"--features: view {name!r} has two files, {places[name]} and {path}; give one of them")
        places[name] = path
    return places


def _loading_options(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return image_options, text_options and encoder_options, which are for both, from those of --encoder-option.

    values: the options' values by [image:|text:]NAME. A setting without options is absent from the result. Raises
    InputError for a name of another form.
    """
    settings: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        kind, _, loading_option = name.rpartition(":")
        if not loading_option or kind not in ("", "image", "text"):
            raise InputError(f"--encoder-option: expected {ENCODER_OPTION}, found {name!r}")
        settings.setdefault(f"{kind or 'encoder'}_options", {})[loading_option] = value
    return settings


def _integer(text: str, where: str) -> int:
    """Return a whole number from text. Raises InputError, which begins with `where`, for other text."""
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{where}: expected whole numbers, found {text!r}") from None
