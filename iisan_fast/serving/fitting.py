"""Fit a model by the public functions: store the states that are missing, train, and test."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import api
from ..config import NEIGHBOURS, PLACEMENTS, TUNING_METHODS, FeaturesConfig, ModelConfig, ViewConfig
from ..data import Dataset
from ..errors import InputError, check_choice
from ..files import absolute_path, as_path, cache_folder
from ..fingerprints import value_digest
from ..setting_fields import from_dict, to_dict
from ..setting_sources import PathLike, base_settings
from ..settings import EXTRACTION_SETTINGS, PROTOCOL_SETTINGS, RUN_SETTINGS, run_config, take_views
from ..states import EncoderPlaces, Store
from ..training import RunFolder, read_initial_weights
from ..trusted_code import TRUST, is_trusted

ARGUMENTS_OF_FIT = {"dataset", "cache", "views", "out", "device", "on_epoch", "dry_run", "changes", "settings"}
NAMES_OF_ENCODERS = {"text_encoder": "text", "image_encoder": "image"}  # here and as arguments of the class
OTHERS_OF_TRAIN = [name for name in inspect.signature(api.train).parameters if name not in ARGUMENTS_OF_FIT]
KNOWN = dict.fromkeys((*OTHERS_OF_TRAIN, *RUN_SETTINGS, "extraction", *EXTRACTION_SETTINGS))
FIT_SETTINGS = tuple(name for name in KNOWN if name not in NAMES_OF_ENCODERS)
OF_BOTH_STEPS = ("layer_groups",)  # the setting that extraction and the model have
WITHOUT_STATES = ("id", NEIGHBOURS)  # methods that may be fitted without encoders


def described_views(
    text: PathLike | None, image: PathLike | None, settings: Mapping[str, Any]
) -> tuple[list[ViewConfig], dict[str, Any]]:
    """Return the views of a text and an image encoder, image first, and the settings that are not theirs.

    Raises InputError for settings that an encoder cannot have, or without an encoder to have them.
    """
    remaining = dict(settings)
    for name, encoder in (("text_encoder", text), ("image_encoder", image)):
        if encoder is not None:
            remaining[name] = str(as_path(NAMES_OF_ENCODERS[name], encoder))
    views = take_views(remaining)
    return views, remaining


def listed_features(features: Mapping[str, PathLike] | Sequence[FeaturesConfig]) -> list[FeaturesConfig]:
    """Return features as a list of views. Raises InputError for what is neither files by name nor FeaturesConfigs."""
    if isinstance(features, Mapping):
        return [FeaturesConfig(name, str(as_path(f"features.{name}", path))) for name, path in features.items()]
    if isinstance(features, FeaturesConfig):
        return [features]
    if not isinstance(features, (list, tuple)) or not all(isinstance(view, FeaturesConfig) for view in features):
        raise InputError(
            f"features: expected files by the names of their views, or FeaturesConfigs, found {features!r}"
        )
    return list(features)


def encoder_places(text: PathLike | None, image: PathLike | None, settings: Mapping[str, Any]) -> EncoderPlaces:
    """Return where the encoders of a model are, for new items. Raises InputError for what is no path."""
    places = {"text": text, "image": image}
    paths = {name: None if place is None else str(as_path(name, place)) for name, place in places.items()}
    return EncoderPlaces(paths["image"], paths["text"], is_trusted(settings))


def fit_run(
    data: PathLike | Dataset,
    out: PathLike | None,
    views: Sequence[ViewConfig],
    cache: PathLike | None,
    settings: Mapping[str, Any],
    common: Mapping[str, Any],
    features: Sequence[FeaturesConfig] = (),
) -> dict[str, Any]:
    """Train a run, by states that are stored first if they are missing, and return what `api.train` does.

    views: of the encoders; none takes those of the settings' `config`, or the views that the cache has. cache: of the
    states; None takes a folder of the user's cache. settings: FIT_SETTINGS without those of encoders. common: device
    and on_epoch. features: ready-made views, which come after those of encoders. Raises InputError for settings that
    cannot be used, before an encoder runs.
    """
    chosen = dict(settings)
    base = base_settings(chosen.pop("config", None))
    if out is not None:
        RunFolder(as_path("out", out)).refuse_if_used()
    if _runs_encoders(chosen, base):
        return api.train(data, cache, views=[*views, *features], config=base, out=out, **chosen, **common)
    if not (views or base.get("encoders")):
        if not (features or base.get("features")):
            _refuse_nothing_to_read(cache or base.get("cache"), _named_method(chosen, base))
        elif _named_method(chosen, base) is None and (len(features) > 1 or cache is not None):
            chosen["method"] = "iisan-versa"
        return api.train(data, cache, views=features, config=base, out=out, **chosen, **common)
    if views:
        base = {name: value for name, value in base.items() if name not in ("cache", "encoders", "views", "uncached")}
    for_extraction, for_training = _divided(chosen)
    encoders = views or [from_dict(ViewConfig, view, "encoders") for view in base["encoders"]]
    where = cache or base.get("cache") or default_cache(data, encoders, for_extraction)
    _refuse_unfit_settings(data, where, [view.name for view in encoders], for_training, base, features)
    extracted = api.extract(data, where, views=views, config=base, device=common["device"], **for_extraction)
    names = [view.view for view in extracted]
    if _named_method(chosen, base) is None and (features or _are_unequal(as_path("cache", where), names)):
        for_training["method"] = "iisan-versa"
    stored = () if base.get("features") and not views else (*names, *features)  # or else the file has their order
    return api.train(data, where, views=stored, config=base, out=out, **for_training, **common)


def default_cache(data: PathLike | Dataset, encoders: Sequence[ViewConfig], settings: Mapping[str, Any]) -> Path:
    """Return the folder of the user's cache for the states of a dataset by these encoders and settings."""
    views = [to_dict(view) for view in encoders]
    for view in views:
        if Path(view["encoder"]).is_dir():
            view["encoder"] = absolute_path(Path(view["encoder"]))
    options = {name: value for name, value in settings.items() if name not in ("batch_size", "workers")}
    digest = value_digest({"dataset": absolute_path(_root(data)), "views": views, "settings": options})
    return cache_folder() / "states" / digest[:16]


def _root(data: PathLike | Dataset) -> Path:
    """Return the folder of a dataset. Raises InputError if it is neither a dataset nor a path."""
    return Path(data.root) if isinstance(data, Dataset) else as_path("data", data)


def _named_method(settings: Mapping[str, Any], base: Mapping[str, Any]) -> str | None:
    """Return the method that the settings name; None if they leave it to the default."""
    section = settings.get("model")
    sections = [to_dict(section) if isinstance(section, ModelConfig) else section, base.get("model")]
    methods = [section.get("method") for section in sections if isinstance(section, Mapping)]
    return next((method for method in (settings.get("method"), *methods) if method is not None), None)


def _runs_encoders(settings: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Return True if the encoders run in every step, so that no states are stored."""
    return bool(settings.get("uncached")) or _named_method(settings, base) in TUNING_METHODS


def _refuse_nothing_to_read(cache: PathLike | None, method: str | None) -> None:
    """Raise InputError if there is neither an encoder nor a cache, and the method needs one."""
    if cache is None and method not in WITHOUT_STATES:
        raise InputError(
            "IISAN: expected an encoder, found none; give text or image (a hub name or a folder), the cache of an "
            f"extraction, or a method that reads no content ({', '.join(WITHOUT_STATES)})"
        )


def _divided(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of extraction, and those of training."""
    of_extraction = {*EXTRACTION_SETTINGS, "extraction", TRUST}
    of_protocol = {"protocol", *PROTOCOL_SETTINGS}
    for_extraction = {name: value for name, value in settings.items() if name in of_extraction | of_protocol}
    for_training = {name: value for name, value in settings.items() if name not in of_extraction - {*OF_BOTH_STEPS}}
    return for_extraction, for_training


def _refuse_unfit_settings(
    data: PathLike | Dataset,
    cache: PathLike,
    names: Sequence[str],
    settings: Mapping[str, Any],
    base: Mapping[str, Any],
    features: Sequence[FeaturesConfig],
) -> None:
    """Raise InputError for settings that training would refuse, before an encoder runs."""
    of_arguments = {name: value for name, value in settings.items() if name not in ("table", "init")}
    if settings.get("init") is not None:
        of_arguments["init"] = settings["init"]
    without_encoders = {name: value for name, value in base.items() if name not in ("encoders", "extraction")}
    inputs: dict[str, Any] = {"dataset": _root(data), "cache": as_path("cache", cache), "views": list(names)}
    if features:
        inputs["features"] = [to_dict(view) for view in features]
    config = run_config({**inputs, **of_arguments}, without_encoders)
    check_choice("table", settings.get("table", "auto"), PLACEMENTS)
    if _named_method(settings, base) is not None or len(config.views) == 1:  # or else the states decide on the method
        read_initial_weights(config)


def _are_unequal(cache: Path, names: Sequence[str]) -> bool:
    """Return True if two views of a cache differ in the number or the width of their layers."""
    with Store(cache) as store:
        shapes = {(len(store.view(name)["layers"]), store.view(name)["width"]) for name in names}
    return len(shapes) > 1
