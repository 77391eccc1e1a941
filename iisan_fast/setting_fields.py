"""Settings as dataclass fields: each field carries its help text, its choices and its range.

`setting` makes such a field, `check_settings` converts and checks the values of a dataclass made of them, and
`settings_of` lists them, so that the command line makes its options, their defaults and their help from the same field.
"""

from __future__ import annotations

import dataclasses
import json
import numbers
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import InputError, check_choice, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
RULES = "rules"  # the key of a field's metadata


class YesNo(str):
    """A bare yes, no, on or off of YAML: text, or a truth value if the setting is one."""

    TRUTH = {"yes": True, "on": True, "no": False, "off": False}

    @property
    def truth(self) -> bool:
        """Return the truth value."""
        return self.TRUTH[self.lower()]


@dataclass(frozen=True)
class SettingRules:
    """Meaning of a setting, and the values that it takes."""

    help: str  # one plain sentence
    choices: tuple[str, ...] = ()  # the words that a text may be; empty: any text
    minimum: float | None = None  # the least number
    maximum: float | None = None  # the greatest number
    below: float | None = None  # a number that every value stays below
    automatic: str = ""  # the meaning of the default: None, "auto" or empty, as help shows it


@dataclass(frozen=True)
class Setting:
    """One setting of a dataclass, as the command line needs it."""

    name: str
    type: Any  # the field's type, resolved: int, str | None, Mapping[str, int], tuple[int, ...], …
    default: Any  # dataclasses.MISSING where a value is required
    rules: SettingRules

    @property
    def default_text(self) -> str:
        """Return the default as help shows it; empty if a value is required."""
        if self.default is dataclasses.MISSING:
            return ""
        empty = self.default in (None, (), {})
        if self.rules.automatic:
            return self.rules.automatic if empty else f"{self.default}: {self.rules.automatic}"
        if isinstance(self.default, tuple):
            return ", ".join(map(str, self.default)) or "none"
        return "none" if empty else str(self.default)


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    automatic: str = "",
) -> Any:
    """Return a dataclass field that carries its rules.

    default: the value that stands if none is given; a mapping is copied for each instance. Missing: required.
    minimum, maximum, below: apply to a number, or to each number of a tuple or mapping. None is never checked.
    """
    rules = SettingRules(help, choices, minimum, maximum, below, automatic)
    if isinstance(default, Mapping):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={RULES: rules})
    return dataclasses.field(default=default, metadata={RULES: rules})


def same_setting(cls: type[DataclassInstance], name: str) -> Any:
    """Return a dataclass field with the default and the rules of the field `name` of `cls`."""
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory, metadata=field.metadata)
    return dataclasses.field(default=field.default, metadata=field.metadata)


def settings_of(cls: type[DataclassInstance]) -> dict[str, Setting]:
    """Return the settings of a dataclass by name, in order. Fields that `setting` did not make are left out."""
    hints = typing.get_type_hints(cls)
    settings = {}
    for field in dataclasses.fields(cls):
        if RULES in field.metadata:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            settings[field.name] = Setting(field.name, hints[field.name], default, field.metadata[RULES])
    return settings


def check_settings(config: DataclassInstance) -> None:
    """Convert each value of a dataclass to its declared type and check it; for `__post_init__`.

    A list becomes a tuple, a path becomes text, a number of numpy becomes Python's.
    Raises InputError, naming the setting, for a value of another type, out of range, or not among the choices.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = convert_value(getattr(config, field.name), hints[field.name], field.name)
        if RULES in field.metadata:
            check_value(field.name, value, field.metadata[RULES])
        object.__setattr__(config, field.name, value)


def check_value(name: str, value: Any, rules: SettingRules) -> None:
    """Raise InputError unless a converted value keeps the rules; each part of a tuple or mapping has to keep them."""
    if value is None:
        return
    if isinstance(value, Mapping):
        for key, part in value.items():
            check_value(f"{name}.{key}", part, rules)
        return
    if isinstance(value, tuple):
        for part in value:
            check_value(name, part, rules)
        return
    if rules.choices:
        check_choice(name, value, rules.choices)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_number(name, value, rules)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Return a `cls` made from JSON values.

    where: the dotted name of the section that the values belong to; errors name settings after it.
    Raises InputError for a setting that is unknown or missing, or whose value has the wrong type.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in known:
            raise InputError(f"{prefix}{key}: unknown setting; {nearest(key, known)}")
    hints = typing.get_type_hints(cls)
    for key, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise InputError(f"{prefix}{key}: missing setting")
    return cls(**{key: convert_value(value, hints[key], prefix + key) for key, value in values.items()})


def _check_number(name: str, value: float, rules: SettingRules) -> None:
    """Raise InputError, naming the setting, if a number is outside the range of its rules."""
    too_small = rules.minimum is not None and not value >= rules.minimum
    too_large = rules.maximum is not None and not value <= rules.maximum
    not_below = rules.below is not None and not value < rules.below
    if too_small or too_large or not_below:
        raise InputError(f"{name}: expected {_range_text(rules)}, found {value}")


def _range_text(rules: SettingRules) -> str:
    """Return a range in words: "1 to 64", "at least 1", "0 to below 1"."""
    end = f"below {rules.below}" if rules.below is not None else rules.maximum
    if rules.minimum is None:
        return str(end) if rules.below is not None else f"at most {end}"
    return f"at least {rules.minimum}" if end is None else f"{rules.minimum} to {end}"


def convert_value(value: Any, hint: Any, where: str) -> Any:
    """Return a value in the type `hint` of a field, its parts too: a tuple for a list, text for a path.

    where: the dotted name of the setting. Raises InputError, naming it, if the value does not fit.
    """
    if hint is Any:
        return _untyped(value)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        hint = next((option for option in options if type(value) is option), options[0])
        return convert_value(value, hint, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, _expect(value, Mapping, where), where)
    if origin is tuple:
        element = typing.get_args(hint)[0]
        return tuple(convert_value(item, element, where) for item in _expect(value, (list, tuple), where))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        element = typing.get_args(hint)[1]
        entries = _expect(value, Mapping, where)
        return {key: convert_value(item, element, f"{where}.{key}") for key, item in entries.items()}
    return _expect(_plain(value, hint), hint, where)


def _untyped(value: Any) -> Any:
    """Return a value of any type; a YesNo in it becomes a truth value."""
    if isinstance(value, YesNo):
        return value.truth
    if isinstance(value, Mapping):
        return {key: _untyped(part) for key, part in value.items()}
    return [_untyped(part) for part in value] if isinstance(value, list) else value


def _plain(value: Any, hint: type) -> Any:
    """Return a number, a truth value or a path in Python's own type, as JSON takes it."""
    if isinstance(value, YesNo):
        return value.truth if hint is bool else str(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return value  # a whole number beyond all floats, which is refused as another type
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return os.fspath(value) if hint is str and isinstance(value, os.PathLike) else value


def _expect(value: Any, kind: Any, where: str) -> Any:
    """Return a value unchanged if it is of a kind; a bool is no number.

    Raises InputError, naming the setting `where`, otherwise.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = "names and values" if kind is Mapping else getattr(kind, "__name__", "list")
        raise InputError(f"{where}: expected {expected}, found {json.dumps(value, default=repr)}")
    return value
