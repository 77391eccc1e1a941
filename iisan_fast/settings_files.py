"""Read the JSON files of settings that runs, caches and captions record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import RunConfig
from .errors import InputError
from .setting_fields import from_dict

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
    found = json.dumps(number) if "format" in values else "nothing"
    raise InputError(f"{path}: format: expected {expected}, found {found}; {remedy}")


def read_settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, its settings not yet checked. Raises InputError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
