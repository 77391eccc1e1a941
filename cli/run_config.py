"""A run's configuration from defaults, a file, and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import RunConfig, from_dict, read_run_settings, to_dict
from ..errors import InputError
from .options import PROTOCOL_OPTIONS

# Settings by section; an option's name where it differs.
SETTINGS = {
    "protocol": {name: name for name in (*PROTOCOL_OPTIONS, "missing_captions")},
    "model": {
        name: name
        for name in (
            *("method", "embedding_dim", "activation"),
            *("sanb", "layer_groups", "gates", "intra", "inter"),
        )
    },
    "train": {"epochs": "max_epochs", **{name: name for name in ("patience", "batch_users", "seed", "precision")}},
}
ENCODING = ("attention", "missing_images", "dtype", "items_at_once", "checkpointing")


def run_config(dataset: Path | None, options: dict[str, Any], base: dict[str, Any] | None = None) -> RunConfig:
    """Defaults, then `base`, then the file's settings, then the command line's."""
    values = json.loads(json.dumps(base or {}))
    if options["config_path"] is not None:
        values, _ = read_run_settings(options["config_path"])
    for section, name, value in _given(dataset, options):
        target = values.setdefault(section, {}) if section else values
        if not isinstance(target, dict):
            raise InputError(f"{section}: expected an object of settings, found {json.dumps(target)}")
        target[name] = value
    if not isinstance(values.get("dataset"), str):
        found = json.dumps(values.get("dataset"))
        raise InputError(f"dataset: expected a path, found {found}; give a DATASET argument")
    _give_encoders(values, options)
    reads_cache = isinstance(values.get("cache"), str) and options["method"] != "id"
    if reads_cache and "views" not in values:
        values["views"] = _all_views(Path(values["cache"]))
    return from_dict(RunConfig, values)


def _given(dataset: Path | None, options: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(section, setting, value) of what the command line says of the sections that every run has."""
    paths = {"dataset": dataset, "cache": options["cache"]}
    yield from (("", name, str(path.resolve())) for name, path in paths.items() if path is not None)
    if options["views"] is not None:
        yield "", "views", options["views"].split(",")
    for section, names in SETTINGS.items():
        yield from ((section, setting, options[name]) for name, setting in names.items() if options[name] is not None)
    yield from (("model", name, value) for name, value in _bottlenecks(options["bottlenecks"]).items())
    if options["ks"]:
        yield "evaluation", "ks", list(options["ks"])
    if options["unmasked"]:
        yield "evaluation", "mask_history", False
    if options["rates"]:
        yield "train", "learning_rates", dict(map(_rate, options["rates"]))


def _give_encoders(values: dict[str, Any], options: dict[str, Any]) -> None:
    """Puts the encoders that run, and how they do, into the configuration."""
    if options["encoded"]:
        values["uncached"] = {"views": [to_dict(view) for view in options["encoded"]]}
        if options["views"] is None:
            values.pop("views", None)  # a file's, of other encoders
    elif options["uncached"] and not values.get("uncached"):
        raise InputError("--uncached: say what runs: give --image-encoder, --text-encoder or --view")
    given = {name: options[name] for name in ENCODING if options[name] is not None}
    if values.get("uncached"):
        values["uncached"].update(given)
    elif given:
        raise InputError(
            f"--{next(iter(given)).replace('_', '-')}: needs encoders that run; give --uncached and encoders"
        )


def _all_views(cache: Path) -> list[str]:
    from ..states import Store

    with Store(cache) as store:
        names = list(store.views)
    if not names:
        raise InputError(f"{cache}: holds no view yet; run iisan-fast extract")
    if len(names) > 2:
        raise InputError(f"{cache}: holds {len(names)} views ({', '.join(names)}); choose one or two with --views")
    return names


def _bottlenecks(texts: Sequence[str]) -> dict[str, Any]:
    """What --bottleneck says of all towers, and of some."""
    found: dict[str, Any] = {}
    for text in texts:
        tower, _, width = text.rpartition("=")
        if not width.isdecimal():
            raise InputError(f"--bottleneck: expected WIDTH or TOWER=WIDTH, found {text!r}")
        if tower:
            found.setdefault("bottlenecks", {})[tower] = int(width)
        else:
            found["bottleneck"] = int(width)
    return found


def _rate(text: str) -> tuple[str, float]:
    group, _, rate = text.partition("=")
    try:
        return group, float(rate)
    except ValueError:
        raise InputError(f"--learning-rate: expected GROUP=RATE, found {text!r}") from None
