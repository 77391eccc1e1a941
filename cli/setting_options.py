"""Command line options made from the settings of a dataclass: name, type, choices, range, default and help.

An option that is not given has the value None, so that defaults live in the dataclass alone.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from ..setting_fields import Setting, SettingRules, check_value, settings_of
from .help_pages import option

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LONGEST_METAVAR = 56  # characters; longer lists of choices stand in the help text
WORDS = {int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Spelling:
    """The words of an option where the command line does not use the field's name."""

    flags: str  # as click takes them: "--epochs", "--gates/--no-gates"
    metavar: str | None = None
    bare: str = ""  # of a mapping's option: the setting that a VALUE without KEY= is for
    commas: bool = True  # False: values of a list may hold commas, so that its option is only repeated


SPELLINGS = {
    "max_epochs": Spelling("--epochs"),
    "ks": Spelling("--k"),
    "mask_history": Spelling("--mask-history/--unmasked"),
    "unescape_titles": Spelling("--unescape-titles/--raw-titles"),
    "bottlenecks": Spelling("--bottleneck", "WIDTH|TOWER=WIDTH", bare="bottleneck"),
    "learning_rates": Spelling("--learning-rate", "GROUP=RATE"),
}


class Word(click.ParamType):
    """A number or a text, checked by the rules of its setting."""

    def __init__(self, kind: type, rules: SettingRules) -> None:
        """Take int, float or str as the kind of the value."""
        self.kind = kind
        self.rules = rules
        self.name = {int: "integer", float: "number"}.get(kind, "text")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the converted value. Raises InputError, naming the option, for a value that the rules refuse."""
        name = _name(param)
        try:
            converted = self.kind(value)
        except ValueError:
            raise InputError(f"{name}: expected {WORDS[self.kind]}, found {value!r}") from None
        check_value(name, converted, self.rules)
        return converted


class Words(click.ParamType):
    """A list with commas between its parts."""

    def __init__(self, part: click.ParamType) -> None:
        """Take the type of each part."""
        self.part = part
        self.name = f"{part.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """Return the converted parts. Raises InputError for a part that is refused."""
        return tuple(self.part.convert(text.strip(), param, ctx) for text in value.split(","))


class KeyedWord(click.ParamType):
    """A key and its value as KEY=VALUE. A VALUE alone has the empty key, if the option allows it."""

    def __init__(self, kind: type, rules: SettingRules, metavar: str, is_bare_allowed: bool) -> None:
        """Take the kind of the value (Any: JSON or text), and the form of the text as help shows it."""
        self.value = None if kind is Any else Word(kind, rules)
        self.name = metavar
        self.is_bare_allowed = is_bare_allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Return key and value; a value of any type may be JSON. Raises InputError for text of another form."""
        key, equals, text = value.rpartition("=") if self.value else value.partition("=")
        expected = self.name.replace("|", " or ") if self.is_bare_allowed else self.name
        mistake = f"{_name(param)}: expected {expected}, found {value!r}"
        if (equals and not key) or not (equals or self.is_bare_allowed):
            raise InputError(mistake)
        if self.value is None:
            return key, json_or_text(text)
        try:
            self.value.kind(text)
        except ValueError:
            raise InputError(mistake) from None
        return key, self.value.convert(text, param, ctx)


def setting_options(
    config: type[DataclassInstance],
    group: str | Mapping[str, str],
    *,
    without: Collection[str] = (),
    spellings: Mapping[str, Spelling] = SPELLINGS,
    defaults: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[Any], Any]:
    """Return the decorator that gives a command an option for each setting of a dataclass.

    group: the heading in the command's help; a mapping gives the heading of each setting by name.
    without: names of settings that get no option.
    defaults: by name, what the help says of a setting's default in place of the dataclass's own.
    A list may be written with commas, and its option repeated. A mapping's option, KEY=VALUE, may be repeated.
    """
    declared = []
    for name, setting in _optional_settings(config, without, spellings).items():
        heading = group if isinstance(group, str) else group[name]
        spelling = spellings.get(name)
        shared = settings_of(config)[spelling.bare] if spelling and spelling.bare else None
        declared.append(_option(setting, heading, spelling, shared, defaults.get(name)))

    def decorate(command: Any) -> Any:
        for add_option in reversed(declared):
            command = add_option(command)
        return command

    return decorate


def given_settings(
    options: dict[str, Any],
    config: type[DataclassInstance],
    *,
    without: Collection[str] = (),
    spellings: Mapping[str, Spelling] = SPELLINGS,
) -> dict[str, Any]:
    """Take the options that `setting_options` made for a dataclass out of `options`; return those that are given."""
    settings = {}
    for name in _optional_settings(config, without, spellings):
        value = options.pop(name)
        if value is None:
            continue
        bare = spellings[name].bare if name in spellings else ""
        if bare and "" in value:
            settings[bare] = value.pop("")
        if not bare or value:
            settings[name] = value
    return settings


def option_names(
    settings: Mapping[str, Any], section: str, spellings: Mapping[str, Spelling] = SPELLINGS
) -> dict[str, str]:
    """Return the option of each setting of a section that is given, by the setting's dotted name."""
    names = {}
    for name in settings:
        keyed = next((other for other, spelling in spellings.items() if spelling.bare == name), name)
        flags = spellings[keyed].flags if keyed in spellings else f"--{name.replace('_', '-')}"
        names[f"{section}.{name}"] = flags
    return names


def json_or_text(text: str) -> Any:
    """Return the JSON value of a text, or the text itself if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _optional_settings(
    config: type[DataclassInstance], without: Collection[str], spellings: Mapping[str, Spelling]
) -> dict[str, Setting]:
    """Return the settings that get an option of their own name."""
    settings = settings_of(config)
    shared = {spellings[name].bare for name in settings if name in spellings}
    return {name: setting for name, setting in settings.items() if name not in without and name not in shared}


def _option(
    setting: Setting, group: str, spelling: Spelling | None, shared: Setting | None, default: str | None
) -> Callable[[Any], Any]:
    """Return the decorator of one setting's option.

    shared: the setting that a VALUE without KEY= is for. default: what the help says of the default; None for its own.
    """
    kind = _without_none(setting.type)
    dashed = setting.name.replace("_", "-")
    flags = f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}"
    if spelling is not None:
        flags = spelling.flags
    attributes: dict[str, Any] = {"group": group, "default": None, "show_default": False}
    if kind is bool:
        return option(flags, setting.name, help=_help(setting, default=default), **attributes)
    origin = typing.get_origin(kind)
    metavar = spelling.metavar if spelling else None
    if origin is tuple:
        part = _word(typing.get_args(kind)[0], setting.rules)
        whole = spelling is not None and not spelling.commas
        attributes |= {"type": part if whole else Words(part), "multiple": True}
        attributes["callback"] = _repeated if whole else _joined
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        keyed = KeyedWord(typing.get_args(kind)[1], setting.rules, metavar or "KEY=VALUE", shared is not None)
        attributes |= {"type": keyed, "multiple": True, "callback": _merged}
    else:
        attributes["type"] = _word(kind, setting.rules)
    choices = "|".join(setting.rules.choices)
    listed = len(choices) > LONGEST_METAVAR or (bool(choices) and origin is tuple)
    if listed:
        metavar = metavar or "NAME"
    text = _help(setting, listed, default)
    if shared is not None:
        keyed_form = attributes["type"].name.rpartition("|")[2]
        meaning = f"{keyed_form}: {setting.rules.help[0].lower()}{setting.rules.help[1:]}"
        text = _help(shared).replace(shared.rules.help, f"{shared.rules.help} {meaning}")
    return option(flags, setting.name, help=text, metavar=metavar, **attributes)


def _word(kind: type, rules: SettingRules) -> click.ParamType:
    """Return the option's type for one value: a choice of words, or a number or text with its range."""
    return click.Choice(rules.choices) if rules.choices else Word(kind, rules)


def _help(setting: Setting, list_choices: bool = False, default: str | None = None) -> str:
    """Return the help text of a setting's option: its meaning, its choices if they are listed, its default.

    default: in place of the setting's own.
    """
    text = setting.rules.help
    if list_choices:
        text += f" One of {', '.join(setting.rules.choices)}."
    if default is None:
        default = setting.default_text
        if isinstance(setting.default, bool):
            default = "on" if setting.default else "off"
    return text if default in ("", "none") else f"{text}  [default: {default}]"


def _joined(_context: click.Context, _parameter: click.Parameter, lists: tuple[tuple[Any, ...], ...]) -> Any:
    """Return the parts of all lists as one, or None if there is no list."""
    return sum(lists, ()) or None


def _repeated(_context: click.Context, _parameter: click.Parameter, values: tuple[Any, ...]) -> Any:
    """Return the values of a repeated option, or None if there are none."""
    return values or None


def _merged(_context: click.Context, _parameter: click.Parameter, pairs: tuple[tuple[str, Any], ...]) -> Any:
    """Return keys and values as a mapping, or None if there are none."""
    return dict(pairs) or None


def _without_none(hint: Any) -> Any:
    """Return the type X of X | None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _name(parameter: click.Parameter | None) -> str:
    """Return an option as the user writes it, such as "--k", for an error message."""
    return parameter.opts[0] if parameter is not None else "value"
