"""The options of train as flat settings, their texts read into numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InputError

LISTED = ("bottlenecks", "rates", "ks", "unmasked")  # options that are read below; the others are settings as they are


def flat_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a command line gives, by the names that `iisan_fast.train` takes."""
    settings = {name: value for name, value in options.items() if name not in LISTED and value is not None}
    settings |= _bottlenecks(options["bottlenecks"])
    if options["views"] is not None:
        settings["views"] = options["views"].split(",")
    if options["ks"]:
        settings["ks"] = options["ks"]
    if options["unmasked"]:
        settings["mask_history"] = False
    if options["rates"]:
        settings["learning_rates"] = dict(map(_rate, options["rates"]))
    return settings


def _bottlenecks(texts: Sequence[str]) -> dict[str, Any]:
    """Return `bottleneck` and `bottlenecks` from the texts WIDTH and TOWER=WIDTH."""
    settings: dict[str, Any] = {}
    for text in texts:
        tower, _, width = text.rpartition("=")
        if not width.isdecimal():
            raise InputError(f"--bottleneck: expected WIDTH or TOWER=WIDTH, found {text!r}")
        if tower:
            settings.setdefault("bottlenecks", {})[tower] = int(width)
        else:
            settings["bottleneck"] = int(width)
    return settings


def _rate(text: str) -> tuple[str, float]:
    group, _, rate = text.partition("=")
    try:
        return group, float(rate)
    except ValueError:
        raise InputError(f"--learning-rate: expected GROUP=RATE, found {text!r}") from None
