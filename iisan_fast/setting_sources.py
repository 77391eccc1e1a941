"""The settings that a command starts from: a file, a mapping or a configuration, changed by dotted names.

They have the form of a run's config.json, which may leave out any part, with two parts more: `encoders`, a list of
views, and `extraction`. Extraction makes a cache by the encoders. Training reads the views of these names in the cache,
or runs the encoders in every step. An entry of `encoders` with the source features is one of the part `features`.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from .config import (
    EvaluationConfig,
    ExtractionConfig,
    FeaturesConfig,
    ModelConfig,
    ProtocolConfig,
    RunConfig,
    ScoringConfig,
    TrainConfig,
    UncachedConfig,
    ViewConfig,
    is_features,
)
from .errors import InputError, nearest
from .files import absolute_path, as_path
from .setting_fields import convert_value, from_dict, to_dict
from .settings_files import RUN_FORMAT, Names, format_number, parse_yaml_value, read_settings_file

PathLike: TypeAlias = "str | os.PathLike[str]"
Values = dict[str, Any]
Refusal = Callable[[Names, str], InputError]

SECTIONS: dict[str, Any] = {
    "protocol": ProtocolConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "evaluation": EvaluationConfig,
    "scoring": ScoringConfig,
    "uncached": UncachedConfig,
    "extraction": ExtractionConfig,
}
SOURCES_OF_A_RUN = ("dataset", "cache", "views", "init")  # settings of RunConfig that belong to no section
FOLDERS_OF_A_RUN = ("dataset", "cache", "init")
PARTS = (*SOURCES_OF_A_RUN, "encoders", "features", *SECTIONS)


def base_settings(config: RunConfig | PathLike | Mapping[str, Any] | None) -> Values:
    """Return the settings to start from, checked part by part; none are {}.

    config: a configuration, settings in the form of one, or a YAML or JSON file of them, whose paths are taken from
        the working folder.
    Raises InputError, with the file and the line, for settings that are unknown or cannot be used.
    """
    if config is None:
        return {}
    if isinstance(config, RunConfig):
        return to_dict(config)
    if isinstance(config, Mapping):
        return _checked(copy.deepcopy(dict(config)), lambda _, message: InputError(message))
    file = read_settings_file(as_path("config", config))
    if "format" in file.values:
        format_number(file.values, file.path, (1, RUN_FORMAT), "use the version of iisan-fast that made the run")
        del file.values["format"]
    values = _checked(file.values, file.error)
    for name in FOLDERS_OF_A_RUN:
        if isinstance(values.get(name), str):
            values[name] = str(absolute_path(as_path(name, values[name])))
    return values


def parse_changes(texts: Iterable[str]) -> Values:
    """Return the changes that texts such as "model.dropout=0.2" ask for, by dotted name; each value is YAML.

    Raises InputError for another text.
    """
    changes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InputError(f"--set: expected SECTION.FIELD=VALUE, found {text!r}")
        try:
            changes[name.strip()] = parse_yaml_value(value)
        except ValueError as error:
            raise InputError(f"--set {name}: {error}") from None
    return changes


def change_settings(values: Values, changes: Mapping[str, Any], parts: Collection[str] = PARTS) -> None:
    """Change settings, in place, by their dotted names: "model.dropout", "encoders.title.max_tokens", "cache".

    parts: the parts that may be changed. Raises InputError for a name that is no setting of them.
    """
    for name, value in changes.items():
        part, *rest = name.split(".")
        if part not in parts:
            other = "is no setting of this command" if part in PARTS else "unknown setting"
            raise InputError(f"{name}: {other}; {_nearest_name(name, parts)}")
        if part in SECTIONS and not rest:
            first = next(iter(typing.get_type_hints(SECTIONS[part])))
            raise InputError(f"{name}: is a section of settings; name one of them, as {name}.{first}")
        if part in SOURCES_OF_A_RUN and not rest:
            values[part] = value
        elif part == "encoders":
            encoders = values.get("encoders") or (values.get("uncached") or {}).get("views") or []
            _change_view(ViewConfig, encoders, name, rest, value)
        elif part == "features":
            _change_view(FeaturesConfig, values.get("features") or [], name, rest, value)
        else:
            if values.get(part) is None:
                values[part] = {}
            _change_field(SECTIONS.get(part), values[part], name, rest, value)


def view_from_values(values: Mapping[str, Any], where: str = "") -> ViewConfig | FeaturesConfig:
    """Return the view that plain values describe, of an encoder or of features.

    A view without a name is named after its source and pooling, or after the file of features. where: the dotted name
    of the values, for errors. Raises InputError for values that describe no view.
    """
    if is_features(values):
        return features_from_values({name: value for name, value in values.items() if name != "source"}, where)
    source, pooling = values.get("source"), values.get("pooling")
    if "name" not in values and isinstance(source, str):
        values = {"name": f"{source}-{pooling}" if pooling else source, **values}
    return from_dict(ViewConfig, values, where)


def features_from_values(values: Mapping[str, Any], where: str = "") -> FeaturesConfig:
    """Return the features that plain values describe; those without a name are named after their file."""
    path = values.get("path")
    if "name" not in values and isinstance(path, (str, os.PathLike)):
        values = {"name": Path(path).name.partition(".")[0], **values}
    return from_dict(FeaturesConfig, values, where)


def _checked(values: Values, refusal: Refusal) -> Values:
    """Check each part for itself, name the encoders, and return the settings without parts that are None.

    Raises the error that `refusal` makes for an unknown part, and for a part that does not fit its type.
    """
    for part in values:
        if part not in PARTS:
            raise refusal((part,), f"{part}: unknown setting; {nearest(part, PARTS)}")
    values = {part: value for part, value in values.items() if value is not None}
    for part, value in values.items():
        if part in SECTIONS:
            _check_section(part, SECTIONS[part], value, refusal)
        elif part in SOURCES_OF_A_RUN:
            _check_source(part, value, refusal)
    if "encoders" in values:
        if "views" in (values.get("uncached") or {}):
            raise refusal(("encoders",), "encoders, uncached.views: are one setting; give one of them")
        _divide_views(values, _checked_views("encoders", values["encoders"], refusal))
    if "features" in values:
        views = _checked_views("features", values["features"], refusal)
        values["features"] = [to_dict(view) for view in views]
    return values


def _divide_views(values: Values, views: list[ViewConfig | FeaturesConfig]) -> None:
    """Put the views of the part `encoders` into `encoders` and `features`; their order is that of the run's views."""
    features = [to_dict(view) for view in views if isinstance(view, FeaturesConfig)]
    values["encoders"] = [to_dict(view) for view in views if isinstance(view, ViewConfig)]
    if features:
        values["features"] = [*features, *(values.get("features") or [])]
        values.setdefault("views", [view.name for view in views])


def _check_section(part: str, section: Any, settings: Any, refusal: Refusal) -> None:
    """Raise the error that `refusal` makes unless the settings of a part, such as "model", fit its dataclass."""
    if isinstance(settings, section):
        return
    if not isinstance(settings, Mapping):
        raise refusal((part,), f"{part}: expected names and values, found {settings!r}")
    views = {"views": ()} if section is UncachedConfig else {}  # a file may name its encoders in their own part
    try:
        from_dict(section, {**views, **settings}, part)
    except InputError as error:
        raise refusal((part, *_names_in(str(error), part)), str(error)) from None


def _check_source(name: str, value: Any, refusal: Refusal) -> None:
    """Check the type of a setting of RunConfig that belongs to no section. Raises the error that `refusal` makes."""
    try:
        convert_value(value, typing.get_type_hints(RunConfig)[name], name)
    except InputError as error:
        raise refusal((name,), str(error)) from None


def _checked_views(part: str, entries: Any, refusal: Refusal) -> list[ViewConfig | FeaturesConfig]:
    """Return the views in a part of a file, "encoders" or "features".

    Raises an error that `refusal` makes for bad ones and for equal names.
    """
    if not isinstance(entries, (list, tuple)):
        raise refusal((part,), f"{part}: expected a list of views, found {entries!r}")
    views: list[ViewConfig | FeaturesConfig] = []
    for index, values in enumerate(entries):
        where = f"{part}.{index + 1}"
        if isinstance(values, (ViewConfig, FeaturesConfig)):
            views.append(values)
            continue
        if not isinstance(values, Mapping):
            raise refusal((part,), f"{where}: expected names and values, found {values!r}")
        try:
            of_features = part == "features" and not is_features(values)
            views.append(features_from_values(values, where) if of_features else view_from_values(values, where))
        except InputError as error:
            raise refusal((part, str(index), *_names_in(str(error), where)), f"{error}") from None
    names = [view.name for view in views]
    if len(set(names)) < len(names):
        raise refusal((part,), f"{part}: two have one name ({', '.join(names)}); give each its own name")
    return views


def _names_in(message: str, where: str) -> Names:
    """Return the names below `where` that an error's message begins with: "model.dropout: …" or "dropout: …".

    Any other message gives its text before the first ":" or "," as a name, so the result is never empty.
    """
    first = message.partition(":")[0].partition(",")[0]
    return tuple(first.removeprefix(f"{where}.").split("."))


def _change_view(kind: Any, views: list[Values], name: str, rest: list[str], value: Any) -> None:
    """Change a setting of one view in place; the name of the view may hold dots.

    kind: ViewConfig or FeaturesConfig. views: of the part. name: the whole dotted name, for errors, such as
    "encoders.title.max_tokens". rest: its parts after "encoders". Raises InputError if there is no such view or no such
    setting.
    """
    part = name.partition(".")[0]
    by_name = {view["name"]: view for view in views}
    if not by_name:
        raise InputError(f"{name}: the settings hold no {part}; give a settings file that does")
    first_parts = [".".join(rest[:count]) for count in range(len(rest), 0, -1)]
    view_name = next((first for first in first_parts if first in by_name), None)
    if view_name is None:
        word = "encoder" if part == "encoders" else "features"
        raise InputError(f"{name}: unknown {word}; {nearest(rest[0] if rest else '', by_name)}")
    _change_field(kind, by_name[view_name], name, rest[view_name.count(".") + 1 :], value)


def _change_field(section: Any, settings: Any, name: str, rest: list[str], value: Any) -> None:
    """Change the field, or the entry of a field of names and values, that `rest` leads to.

    section: the dataclass of the settings, None if it has no fields. settings: the dict that is changed in place.
    name: the whole dotted name, for errors. Raises InputError for an unknown field, and for an entry of a field that
    has none.
    """
    fields = {} if section is None else typing.get_type_hints(section)
    field, *keys = rest or [""]
    if field not in fields:
        above = name.removesuffix(f".{'.'.join(rest)}")
        known = [f"{above}.{known}" for known in fields]
        raise InputError(f"{name}: unknown setting; {nearest(name, known or PARTS)}")
    if not isinstance(settings, dict):
        raise InputError(f"{name}: expected names and values to change, found {settings!r}")
    if not keys:
        settings[field] = value
        return
    if typing.get_origin(fields[field]) is not Mapping:
        raise InputError(f"{name}: {field} is one value; leave out .{'.'.join(keys)}")
    settings[field] = {**settings.get(field, {}), ".".join(keys): value}


def _nearest_name(name: str, parts: Collection[str]) -> str:
    """Return "did you mean …?" for a dotted name whose first part is unknown; a field's name finds its section."""
    sections = {part: section for part, section in SECTIONS.items() if part in parts}
    homes = [
        f"{part}.{field.name}"
        for part, section in sections.items()
        for field in dataclasses.fields(section)
        if field.name == name
    ]
    part = name.partition(".")[0]
    if part in PARTS:
        return f"expected one of {', '.join(parts)}"
    return f"did you mean {' or '.join(homes)}?" if homes else nearest(part, parts)
