"""Resolve flat settings, as the command line and the Python functions take them, into configurations.

A setting has one name everywhere: the name of its field in a configuration of config.py. Only `epochs` is a shorter
name for `max_epochs`. Settings of the two usual encoders have their kind before the name: `image_pooling`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .config import EvaluationConfig, ExtractionConfig, ProtocolConfig, RunConfig, ScoringConfig, ViewConfig
from .errors import InputError, check_choice, nearest
from .files import absolute_path, as_path
from .setting_fields import from_dict, to_dict
from .setting_sources import FOLDERS_OF_A_RUN, PARTS, SECTIONS, change_settings
from .state_sources import choose_source, method_of, read_views_of_cache
from .trusted_code import TRUST, is_trusted, refuse_unasked_code, trust_running_views, without_trust

Section = TypeVar("Section", ProtocolConfig, EvaluationConfig, ExtractionConfig, ScoringConfig)
OTHER_NAMES = {"epochs": "max_epochs"}
RUN_SECTIONS = ("protocol", "model", "train", "evaluation", "scoring", "uncached")
SECTION_OF = {
    field.name: section
    for section in RUN_SECTIONS
    for field in dataclasses.fields(SECTIONS[section])
    if field.name != "views"
}
KINDS = ("image", "text")  # of the usual encoders
OF_A_KIND = ("encoder", "pooling", "layers", "options", "revision")  # fields of ViewConfig that each of them has
OF_BOTH = tuple(  # the fields that both share; a revision of one kind goes before that of both
    field.name
    for field in dataclasses.fields(ViewConfig)
    if field.name == "revision" or field.name not in ("name", "source", "layer_groups", TRUST, *OF_A_KIND)
)
ENCODER_SETTINGS = (*(f"{kind}_{part}" for kind in KINDS for part in OF_A_KIND), "text_source", *OF_BOTH)
ENCODER_SETTINGS += ("encoder_options", TRUST)
PROTOCOL_SETTINGS, EVALUATION_SETTINGS, EXTRACTION_SETTINGS = (
    tuple(field.name for field in dataclasses.fields(section))
    for section in (ProtocolConfig, EvaluationConfig, ExtractionConfig)
)
# Of ScoringConfig, those that a finished run can be ranked with.
TERM_SETTINGS = ("cooccurrence", "similarity", "cold_bias", "fit_terms")
RUN_SETTINGS = (*SECTION_OF, *OTHER_NAMES, *ENCODER_SETTINGS)
NOT_OF_A_RUN = "extraction"  # the part of a settings file that training does not read
PARTS_OF_EXTRACTION = ("dataset", "cache", "encoders", "protocol", "extraction")


class Extraction(NamedTuple):
    """All that one extraction is made from."""

    dataset: Path
    cache: Path
    views: list[ViewConfig]
    protocol: ProtocolConfig
    config: ExtractionConfig


def refuse_unknown(function: str, names: Collection[str], known: Collection[str]) -> None:
    """Raise InputError for the first of a function's keyword arguments that it does not know."""
    for name in names:
        if name not in known:
            raise InputError(f"{function}: unknown setting {name}; {nearest(name, known)}")


def take_views(
    settings: dict[str, Any], views: Sequence[ViewConfig] = (), layer_groups: int | None = None
) -> list[ViewConfig]:
    """Take the settings of encoders out of `settings`; return the views they describe, image first, and then `views`.

    layer_groups: of every view, none of which may then name its layers itself. trust_remote_code is left in `settings`.
    Raises InputError for settings of an encoder that is not there, and for two views of one name.
    """
    shared = {name: value for name in OF_BOTH if (value := settings.pop(name, None)) is not None}
    source = settings.pop("text_source", None)
    options = settings.pop("encoder_options", None)
    trusted = is_trusted(settings)
    if source is not None:
        check_choice("text_source", source, ("title", "caption"))
    described = [
        _view("image", "image", settings, shared, options or {}),
        _view("text", source or "title", settings, shared, options or {}),
    ]
    chosen = [view for view in described if view is not None]
    if not chosen and (shared or source or options):
        needing = ", ".join((*OF_BOTH, "text_source", "encoder_options"))
        raise InputError(f"{needing}: need image_encoder or text_encoder; a view has such settings itself")
    chosen = [dataclasses.replace(view, trust_remote_code=True) if trusted else view for view in (*chosen, *views)]
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
    changes: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Resolve a run's configuration: the defaults, changed by `base`, by `settings` and by `changes`.

    settings: dataset, cache, views (names in the cache), whole sections as configurations, and settings of the sections
        by their names alone, which change the sections.
    base: settings as `base_settings` returns them. Encoders in it run in every step if `uncached` says so or the method
        trains encoders; otherwise the cache's views of their names are read, and have to be made by them.
    encoders: the views whose encoders run in every step, in place of a cache and of the encoders of `base`.
    uncached: expect encoders that run.
    changes: settings by dotted name, as "model.dropout".
    Raises InputError for settings that are unknown, missing, or do not fit each other.
    """
    values = copy.deepcopy(dict(base or {}))
    asking = without_trust(values)
    if encoders and "views" in (values.get("uncached") or {}):
        values["uncached"] = None  # settings of other encoders
    flat = _renamed({name: value for name, value in settings.items() if name in SECTION_OF or name in OTHER_NAMES})
    for name, value in settings.items():
        if name not in flat and name not in OTHER_NAMES and name != TRUST:
            values[name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    in_uncached = [name for name in flat if SECTION_OF[name] == "uncached"]
    in_uncached += [name for name in changes or {} if name.startswith("uncached.")]
    for name, value in flat.items():
        _set(values, SECTION_OF[name], name, value)
    change_settings(values, changes or {}, [part for part in PARTS if part != NOT_OF_A_RUN])
    names = {*settings, *(changes or {})}
    for name in FOLDERS_OF_A_RUN:
        folder = values.get(name)
        if folder is not None and (name in names or str(folder).startswith("~")):
            values[name] = str(absolute_path(as_path(name, values[name])))
    if not isinstance(values.get("dataset"), str):
        raise InputError(f"dataset: expected a folder, found {json.dumps(values.get('dataset'), default=repr)}")
    _resolve_features(values)
    described = _encoders_of_base(values)
    choose_source(values, names, described, encoders, uncached)
    trust_running_views(values, asking, is_trusted(settings))
    if in_uncached and not values.get("uncached"):
        raise InputError(f"{in_uncached[0]}: needs encoders that run; give uncached and encoders")
    if isinstance(values.get("cache"), str) and method_of(values) != "id" and not values.get("uncached"):
        read_views_of_cache(values, described)
    return from_dict(RunConfig, values)


def extraction_config(
    settings: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    views: Sequence[ViewConfig] = (),
    changes: Mapping[str, Any] | None = None,
) -> Extraction:
    """Resolve an extraction: the defaults, changed by `base`, by `settings` and by `changes`.

    settings: dataset, cache, the sections protocol and extraction, and settings of these and of encoders by their
        names alone.
    base: settings as `base_settings` returns them; its encoders are taken if neither settings nor `views` name any.
    Raises InputError for settings that cannot be used, and if a dataset, a cache or encoders are missing.
    """
    values = copy.deepcopy(dict(base or {}))
    asking = without_trust(values)
    remaining = dict(settings)
    for name in ("protocol", "extraction"):
        if name in remaining:
            values[name] = to_dict(remaining.pop(name))
    for name in [name for name in remaining if name in PROTOCOL_SETTINGS]:
        _set(values, "protocol", name, remaining.pop(name))
    for name in [name for name in remaining if name in EXTRACTION_SETTINGS]:
        _set(values, "extraction", name, remaining.pop(name))
    values |= {name: remaining.pop(name) for name in ("dataset", "cache") if name in remaining}
    change_settings(values, changes or {}, PARTS_OF_EXTRACTION)
    config = from_dict(ExtractionConfig, values.get("extraction") or {}, "extraction")
    in_base = values.get("encoders") or (values.get("uncached") or {}).get("views") or []
    described = [from_dict(ViewConfig, view, "encoders") for view in in_base]
    named = any(name in remaining for name in ENCODER_SETTINGS if name != TRUST)
    chosen = take_views(remaining, list(views) if views or named else described, config.layer_groups)
    if not (views or named):
        refuse_unasked_code(chosen, asking)
    if not chosen and values.get("features"):
        raise InputError("features: are ready-made, so there is nothing to extract; give them to train")
    if not chosen:
        raise InputError("views: none to encode; give text_encoder, image_encoder or views")
    for name in ("dataset", "cache"):
        if values.get(name) is None:
            raise InputError(f"{name}: none given; name a folder, or a settings file that does")
    protocol = from_dict(ProtocolConfig, values.get("protocol") or {}, "protocol")
    dataset, cache = (as_path(name, values[name]) for name in ("dataset", "cache"))
    return Extraction(dataset, cache, chosen, protocol, config)


def changed_section(name: str, kind: type[Section], section: Section | None, settings: Mapping[str, Any]) -> Section:
    """Return a section of the configuration, by default `kind()`, with `settings` of it changed.

    name: the argument that held the section. Raises InputError where it is of another kind.
    """
    if section is not None and not isinstance(section, kind):
        raise InputError(f"{name}: expected {kind.__name__}, found {section!r}")
    return from_dict(kind, {**to_dict(section or kind()), **settings})


def _view(
    kind: str, source: str, settings: dict[str, Any], shared: Mapping[str, Any], options: Mapping[str, Any]
) -> ViewConfig | None:
    """Take the settings of the image's or the text's encoder out of `settings` and return its view, if there is one.

    Raises InputError if settings of an encoder are there, but no encoder.
    """
    values = {part: value for part in OF_A_KIND if (value := settings.pop(f"{kind}_{part}", None)) is not None}
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
    """Return a view with layer groups. Raises InputError if it names its layers or groups already."""
    if view.layers is not None or view.layer_groups is not None:
        raise InputError(f"layer_groups: view {view.name!r} names its layers already; give one or the other")
    return dataclasses.replace(view, layer_groups=groups)


def _renamed(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat settings by the names of their fields. Raises InputError if a setting has both its names."""
    for short, name in OTHER_NAMES.items():
        if short in flat and name in flat:
            raise InputError(f"{short}, {name}: are one setting; give one of them")
    return {OTHER_NAMES.get(name, name): value for name, value in flat.items()}


def _encoders_of_base(values: dict[str, Any]) -> list[ViewConfig]:
    """Take `encoders` and `extraction` out of a configuration's values and return the views of the cache they make."""
    extraction = from_dict(ExtractionConfig, values.pop("extraction", None) or {}, "extraction")
    views = [from_dict(ViewConfig, view, "encoders") for view in values.pop("encoders", None) or []]
    return views if extraction.layer_groups is None else [_grouped(view, extraction.layer_groups) for view in views]


def _resolve_features(values: dict[str, Any]) -> None:
    """Make the paths of features whole, in place, from the working folder."""
    for view in values.get("features") or []:
        for name in ("path", "ids"):
            if isinstance(view.get(name), str) and view[name]:
                view[name] = str(absolute_path(as_path(name, view[name])))


def _set(values: dict[str, Any], section: str, name: str, value: Any) -> None:
    """Set one setting in a section of a configuration's values.

    Raises InputError if the section holds no settings by name.
    """
    if values.get(section) is None:
        values[section] = {}
    target = values[section]
    if not isinstance(target, dict):
        raise InputError(f"{section}: expected an object of settings, found {json.dumps(target, default=repr)}")
    target[name] = value
