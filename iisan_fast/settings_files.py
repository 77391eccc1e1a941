"""Read files of settings: a user's YAML or JSON, and the JSON that runs, caches and captions record.

YAML is read by the rules of YAML 1.2: `1e-4` is a number, `010` is ten, and only `true` and `false` are truth values. A
bare `yes`, `no`, `on` or `off` becomes a YesNo: a truth value for a setting that is one, text for a setting of text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .config import RunConfig
from .errors import InputError
from .files import refuse_irregular
from .recorded_json import MOST_JSON_BYTES, parse_json_object
from .setting_fields import YesNo, from_dict

Names = tuple[str, ...]  # the names that lead to a value: ("model", "dropout")
MOST_ENTRIES = 10_000  # of a settings file; anchors of YAML can repeat few lines without end
MOST_YAML_BYTES = 1 << 20  # of a settings file; YAML is parsed slowly
RUN_FORMAT = 2  # of a run folder, recorded in their config.json; runs of format 1 record none


def read_run_config(path: Path) -> RunConfig:
    """Return the configuration in a run's config.json. Raises InputError, naming the file, for any mistake in it."""
    values, _ = read_run_settings(path)
    try:
        return from_dict(RunConfig, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_run_settings(path: Path) -> tuple[dict[str, Any], int]:
    """Return the settings in a run's config.json, or in a file like it, and the format of the run.

    The settings are not checked yet. Raises InputError for a format that this version does not know.
    """
    values = read_settings(path)
    remedy = "use the version of iisan-fast that made the run"
    number = format_number(values, path, (1, RUN_FORMAT), remedy) if "format" in values else 1
    values.pop("format", None)
    return values, number


def format_number(values: Mapping[str, Any], path: Path, known: tuple[int, ...], remedy: str) -> int:
    """Return the format number that a JSON file holds. Raises InputError unless it is one of the known numbers."""
    number = values.get("format")
    if type(number) is int and number in known:  # not isinstance: True is an int, and equals 1
        return number
    expected = " or ".join(map(str, known))
    number_text = json.dumps(number) if "format" in values else "nothing"
    raise InputError(f"{path}: format: expected {expected}, found {number_text}; {remedy}")


def read_settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, its settings not yet checked.

    Raises InputError if the file cannot be read or holds anything else, as `parse_json_object` does.
    """
    return parse_json_object(_read_bounded(path, MOST_JSON_BYTES), path)


@dataclass(frozen=True)
class SettingsFile:
    """The settings that a file holds, not yet checked, and the line of each."""

    path: Path
    values: dict[str, Any]
    lines: dict[Names, int] = field(default_factory=dict)  # counted from 1

    def error(self, names: Names, message: str) -> InputError:
        """Return an InputError that says the file, and the line of the innermost of the names that has one."""
        known = [names[:count] for count in range(len(names), 0, -1) if names[:count] in self.lines]
        line = f":{self.lines[known[0]]}" if known else ""
        return InputError(f"{self.path}{line}: {message}")


def read_settings_file(path: Path) -> SettingsFile:
    """Return the settings in a YAML or JSON file, such as a recipe or a run's config.json.

    Raises InputError, with file and line, for a file that is neither, holds a name twice or holds no settings.
    """
    try:
        text = _read_bounded(path, MOST_YAML_BYTES).decode("utf-8-sig")
    except ValueError:
        raise InputError(f"{path}: expected YAML or JSON, found bytes that are not UTF-8") from None
    settings = SettingsFile(path, {})
    try:
        node = yaml.compose(_without_tabs(text), Loader=_SettingsLoader)
        if not isinstance(node, yaml.MappingNode):
            content = "nothing" if node is None else f"a {node.id}"
            raise InputError(f"{path}: expected settings as YAML or JSON, found {content}")
        settings.values.update(_mapping(node, settings, ()))
    except yaml.YAMLError as error:
        raise _unreadable(path, error) from None
    except RecursionError:
        raise InputError(f"{path}: expected settings as YAML or JSON, found too many levels") from None
    return settings


def parse_yaml_value(text: str) -> Any:
    """Return a value that is written as YAML: a number, a truth value, a list, text, … Raises ValueError if it is none.

    Text that is not YAML in itself, such as `a: b: c`, is refused as well.
    """
    settings = SettingsFile(Path("value"), {})
    try:
        node = yaml.compose(text, Loader=_SettingsLoader)
        return None if node is None else _value(node, settings, ())
    except (yaml.YAMLError, InputError, RecursionError):
        raise ValueError(f"expected a value as YAML, found {text!r}") from None


class _SettingsLoader(yaml.SafeLoader):
    """A loader that knows the plain values of YAML 1.2 alone."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_PLAIN = "tag:yaml.org,2002:plain"  # any value without quotes, which `_plain_value` converts
_TEXT = "tag:yaml.org,2002:str"  # text in quotes
_UNTAGGED = (_PLAIN, _TEXT, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_SettingsLoader.add_implicit_resolver(_PLAIN, re.compile(".*", re.DOTALL), None)
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE)


def _value(node: yaml.Node, settings: SettingsFile, names: Names) -> Any:
    """Return the Python value of a YAML node, and note the lines of its parts.

    Raises InputError for a YAML tag, for a number that is too long, and for too many parts.
    """
    line = node.start_mark.line + 1
    if node.tag not in _UNTAGGED:
        raise InputError(f"{settings.path}:{line}: expected a plain value, found the tag {node.tag}")
    if len(settings.lines) > MOST_ENTRIES:
        raise InputError(f"{settings.path}:{line}: expected at most {MOST_ENTRIES} settings, found more")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, settings, names)
    if isinstance(node, yaml.SequenceNode):
        lines = {(*names, str(index)): part.start_mark.line + 1 for index, part in enumerate(node.value)}
        settings.lines.update(lines)
        return [_value(part, settings, (*names, str(index))) for index, part in enumerate(node.value)]
    if node.tag == _TEXT:
        return node.value
    try:
        return _plain_value(node.value)
    except ValueError:  # Python converts at most 4300 digits
        raise InputError(f"{settings.path}:{line}: the number has too many digits ({len(node.value)})") from None


def _mapping(node: yaml.MappingNode, settings: SettingsFile, names: Names) -> dict[str, Any]:
    """Return the values of a YAML mapping, and note the line of each in `settings.lines`.

    names: the names that lead to the mapping. Raises InputError, with file and line, for a name that stands twice.
    """
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(f"{settings.path}:{line}: expected a name, found a {key_node.id}")
        key = key_node.value
        inner_names = (*names, key)
        if key in values:
            first = settings.lines[inner_names]
            raise InputError(f"{settings.path}:{line}: {key} stands twice, first in line {first}; leave one out")
        settings.lines[inner_names] = line
        values[key] = _value(value_node, settings, inner_names)
    return values


def _plain_value(text: str) -> Any:
    """Return the value of a word without quotes: a number, a truth value, None, or the text."""
    word = text.lower()
    if word in _WORDS:
        return _WORDS[word]
    if word in YesNo.TRUTH:
        return YesNo(text)
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(word.replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _read_bounded(path: Path, most: int) -> bytes:
    """Return the bytes of a file. Raises InputError if it cannot be read, or if it has more than `most` bytes."""
    refuse_irregular(path)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > most:
        raise InputError(f"{path}: expected at most {most} bytes of settings, found more; give another file")
    return content


def _without_tabs(text: str) -> str:
    """Return JSON with its tabs, which YAML refuses, as spaces; other text unchanged. A text of JSON holds no tab."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text.replace("\t", " ")


def _unreadable(path: Path, error: yaml.YAMLError) -> InputError:
    """Return the one-line error for text that is neither YAML nor JSON, with the line where reading stopped."""
    mark = getattr(error, "problem_mark", None)
    line = "" if mark is None else f":{mark.line + 1}"
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    if "character '\\t'" in problem:
        problem = "found a tab; YAML is indented by spaces"
    return InputError(f"{path}{line}: neither YAML nor JSON ({problem})")
