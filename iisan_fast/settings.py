"""Flat settings, as the command line and the Python functions take them, into configurations.

A setting has one name everywhere: that of its field in the configurations of config.py. Only `epochs` is a shorter name
for `max_epochs`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Union

from .config import EvaluationConfig, ModelConfig, ProtocolConfig, RunConfig, TrainConfig, UncachedConfig, ViewConfig
from .errors import InputError, check_choice, nearest
from .setting_fields import from_dict, to_dict
from .settings_files import read_run_settings

PathLike = Union[str, "os.PathLike[str]"]
Section = TypeVar("Section", ProtocolConfig, EvaluationConfig)
SECTIONS = {
    "protocol": ProtocolConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "evaluation": EvaluationConfig,
    "uncached": UncachedConfig,
}
OTHER_NAMES = {"epochs": "max_epochs"}
SECTION_OF = {
    setting.name: section
    for section, config in SECTIONS.items()
    for setting in dataclasses.fields(config)
    if setting.name != "views"
}


class ProtocolSettings(TypedDict, total=False):
    """Settings of ProtocolConfig."""

    min_interactions: int
    max_inputs: int
    unescape_titles: bool
    missing_captions: str
    split: str
    validation_from: float
    test_from: float


class EvaluationSettings(TypedDict, total=False):
    """Settings of EvaluationConfig."""

    ks: Sequence[int]
    mask_history: bool
    ties: str
    chunk_mib: int


class EncoderSettings(TypedDict, total=False):
    """An image encoder and a text encoder, a view each."""

    image_encoder: PathLike
    image_pooling: str
    image_layers: Sequence[int]
    image_options: Mapping[str, Any]  # for Hugging Face's from_pretrained
    text_encoder: PathLike
    text_source: str  # title or caption
    text_pooling: str
    text_layers: Sequence[int]
    text_options: Mapping[str, Any]
    max_tokens: int  # these three: of both encoders
    encoder_dtype: str
    encoder_options: Mapping[str, Any]


class ExtractionSettings(ProtocolSettings, EncoderSettings, total=False):
    """Flat settings of `extract`."""


class RunSettings(ProtocolSettings, EvaluationSettings, EncoderSettings, total=False):
    """Flat settings of `train`: those of all sections of RunConfig, and encoders that run in every step."""

    method: str
    embedding_dim: int
    bottleneck: int
    bottlenecks: Mapping[str, int]
    activation: str
    sanb: str
    gates: bool
    intra: bool
    inter: bool | None
    layer_groups: int | None
    blocks: int
    attention_heads: int
    dropout: float
    batch_users: int
    epochs: int
    max_epochs: int
    patience: int
    seed: int
    precision: str
    learning_rates: Mapping[str, float]
    dtype: str
    missing_images: str
    attention: str
    items_at_once: int | None
    checkpointing: bool


def refuse_unknown(function: str, names: Collection[str], known: Collection[str]) -> None:
    """Raise InputError for the first of a function's keyword arguments that it does not know."""
    for name in names:
        if name not in known:
            raise InputError(f"{function}: unknown setting {name}; {nearest(name, known)}")


def as_path(name: str, path: PathLike) -> Path:
    """Return an argument as a path, ~ replaced by the home folder. Raises InputError for another type and for ""."""
    if not isinstance(path, (str, os.PathLike)) or path == "":
        raise InputError(f"{name}: expected a path, found {path!r}")
    return Path(path).expanduser()


def take_views(
    settings: dict[str, Any], views: Sequence[ViewConfig] = (), layer_groups: int | None = None
) -> list[ViewConfig]:
    """Take the settings of encoders out of `settings`; return the views they describe, image first, and then `views`.

    layer_groups: of every view, none of which may then name its layers itself.
    Raises InputError for settings of an encoder that is not there, and for two views of one name.
    """
    shared = {
        name: value for name in ("max_tokens", "encoder_dtype") if (value := settings.pop(name, None)) is not None
    }
    source, options = settings.pop("text_source", None), settings.pop("encoder_options", None)
    if source is not None:
        check_choice("text_source", source, ("title", "caption"))
    described = [
        _view("image", "image", settings, shared, options or {}),
        _view("text", source or "title", settings, shared, options or {}),
    ]
    chosen = [view for view in described if view is not None]
    if not chosen and (shared or source or options):
        needing = "max_tokens, encoder_dtype, text_source, encoder_options"
        raise InputError(f"{needing}: need image_encoder or text_encoder; a view has such settings itself")
    chosen += views
    if layer_groups is not None:
        chosen = [_grouped(view, layer_groups) for view in chosen]
    names = [view.name for view in chosen]
    if len(set(names)) < len(names):
        raise InputError(f"views: two have one name ({', '.join(names)}); give each its own name")
    return chosen


def run_config(
    settings: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    encoders: Sequence[ViewConfig] = (),
    uncached: bool = False,
) -> RunConfig:
    """Resolve a run's configuration: the defaults, changed by `base`, changed by `settings`.

    settings: dataset, cache, views (names in the cache), whole sections as configurations, and settings of the sections
        by their names alone, which change the sections.
    base: settings in the form of a run's config.json.
    encoders: the views whose encoders run in every step, in place of a cache.
    uncached: expect encoders that run, from `encoders` or from `base`.
    """
    values = copy.deepcopy(dict(base or {}))
    flat = _renamed({name: value for name, value in settings.items() if name in SECTION_OF or name in OTHER_NAMES})
    for name, value in settings.items():
        if name not in flat and name not in OTHER_NAMES:
            values[name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    for name in ("dataset", "cache"):
        if name in settings:
            values[name] = str(as_path(name, settings[name]).resolve())
    if not isinstance(values.get("dataset"), str):
        raise InputError(f"dataset: expected a folder, found {json.dumps(values.get('dataset'), default=repr)}")
    _give_encoders(values, settings, encoders, uncached)
    for name, value in flat.items():
        _set(values, SECTION_OF[name], name, value)
    method = values["model"].get("method") if isinstance(values.get("model"), dict) else None
    reads_cache = isinstance(values.get("cache"), str) and method != "id" and not values.get("uncached")
    if reads_cache and "views" not in values:
        values["views"] = _all_views(Path(values["cache"]))
    return from_dict(RunConfig, values)


def base_settings(config: RunConfig | PathLike | Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, or the content of its JSON file, in the form of a run's config.json."""
    if isinstance(config, RunConfig):
        return to_dict(config)
    if isinstance(config, Mapping):
        return dict(config)
    values, _ = read_run_settings(as_path("config", config))
    return values


def changed_section(name: str, kind: type[Section], section: Section | None, settings: Mapping[str, Any]) -> Section:
    """Return a section of the configuration, by default `kind()`, with `settings` of it changed.

    name: the argument that held the section. Raises InputError where it is of another kind.
    """
    if section is not None and not isinstance(section, kind):
        raise InputError(f"{name}: expected {kind.__name__}, found {section!r}")
    return from_dict(kind, {**to_dict(section or kind()), **settings})


def next_run_folder(name: str) -> Path:
    """Return the first runs/NAME-N, counted from 1, that does not exist."""
    number = 1
    while (folder := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return folder


def _view(
    kind: str, source: str, settings: dict[str, Any], shared: Mapping[str, Any], options: Mapping[str, Any]
) -> ViewConfig | None:
    """Take the settings of the image's or the text's encoder out of `settings` and return its view, if there is one."""
    parts = ("encoder", "pooling", "layers", "options")
    values = {part: value for part in parts if (value := settings.pop(f"{kind}_{part}", None)) is not None}
    if "encoder" not in values:
        if values:
            raise InputError(f"{kind}_{next(iter(values))}: needs {kind}_encoder")
        return None
    for name, value in (("encoder_options", options), (f"{kind}_options", values.get("options", {}))):
        if not isinstance(value, Mapping):
            raise InputError(f"{name}: expected names and values, found {value!r}")
    values["options"] = {**options, **values.get("options", {})}
    return from_dict(ViewConfig, {"name": source, "source": source, **shared, **values})


def _grouped(view: ViewConfig, groups: int) -> ViewConfig:
    if view.layers is not None or view.layer_groups is not None:
        raise InputError(f"layer_groups: view {view.name!r} has layers of its own; give one or the other")
    return dataclasses.replace(view, layer_groups=groups)


def _renamed(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat settings by the names of their fields."""
    for short, name in OTHER_NAMES.items():
        if short in flat and name in flat:
            raise InputError(f"{short}, {name}: are one setting; give one of them")
    return {OTHER_NAMES.get(name, name): value for name, value in flat.items()}


def _give_encoders(
    values: dict[str, Any], settings: Mapping[str, Any], encoders: Sequence[ViewConfig], uncached: bool
) -> None:
    """Put the encoders that run into the configuration, and refuse settings of them where none run."""
    if encoders:
        if "uncached" in settings:
            raise InputError("uncached: holds views of its own; leave out the other encoders")
        values["uncached"] = {"views": [to_dict(view) for view in encoders]}
        if "views" not in settings:
            values.pop("views", None)  # those of `base`, of other encoders
    if values.get("uncached"):
        return
    if uncached:
        raise InputError("uncached: no encoders to run; give image_encoder, text_encoder or views")
    for name in settings:
        if SECTION_OF.get(name) == "uncached":
            raise InputError(f"{name}: needs encoders that run; give uncached and encoders")


def _set(values: dict[str, Any], section: str, name: str, value: Any) -> None:
    """Set one setting in a section of a configuration's values."""
    target = values.setdefault(section, {})
    if not isinstance(target, dict):
        raise InputError(f"{section}: expected an object of settings, found {json.dumps(target, default=repr)}")
    target[name] = value


def _all_views(cache: Path) -> list[str]:
    """Return the names of all views in a cache, of which a run takes one or two."""
    from .states import Store  # imports torch, which takes seconds

    with Store(cache) as store:
        names = list(store.views)
    if not names:
        raise InputError(f"{cache}: holds no view yet; run iisan-fast extract")
    if len(names) > 2:
        raise InputError(f"{cache}: holds {len(names)} views ({', '.join(names)}); choose one or two of them as views")
    return names
