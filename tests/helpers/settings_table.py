"""The tables of docs/settings.md, made from the settings' fields."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from iisan_fast.config import FeaturesConfig, ViewConfig
from iisan_fast.setting_fields import Setting, settings_of
from iisan_fast.setting_sources import SECTIONS

HEADER = ["| setting | values | default | meaning |", "|---|---|---|---|"]
WORDS = {int: "whole number", float: "number", str: "text", bool: "true, false"}


def settings_tables() -> str:
    """Return a heading and a table for each section of a settings file, and for an entry of `encoders` or `features`.

    The views of the section `uncached` are left out: `encoders` describes them.
    """
    parts = []
    for name, section in {"encoders": ViewConfig, "features": FeaturesConfig, **SECTIONS}.items():
        rows = [_row(setting) for setting in settings_of(section).values() if setting.name != "views"]
        parts.append("\n".join([f"### {name}", "", *HEADER, *rows]))
    return "\n\n".join(parts)


def _row(setting: Setting) -> str:
    default = setting.default_text or "required"
    if isinstance(setting.default, bool):
        default = default.lower()  # as YAML writes it
    return f"| `{setting.name}` | {_values(setting)} | {default} | {setting.rules.help} |"


def _values(setting: Setting) -> str:
    rules = setting.rules
    kind = _without_none(setting.type)
    if rules.choices:
        return ", ".join(rules.choices)
    origin = typing.get_origin(kind)
    if origin is tuple:
        words = f"list of {WORDS[typing.get_args(kind)[0]]}s"
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        words = "names with values"
    else:
        words = WORDS[kind]
    if rules.minimum is not None:
        words += f" from {rules.minimum:,}"
    if rules.maximum is not None and rules.maximum < 2**31:
        words += f" to {rules.maximum:,}"
    if rules.below is not None:
        words += f", below {rules.below:,}"
    return words


def _without_none(kind: Any) -> Any:
    """Return X of `X | None`."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind
