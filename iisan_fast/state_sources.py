"""Choose where the states of a run's items come from: a cache, ready-made features, encoders that run, or nowhere.

A configuration is here a mapping of plain values, before it becomes a RunConfig. It is changed in place.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import BESIDE_ENCODERS, NEIGHBOURS, SIDE_METHODS, TUNING_METHODS, ModelConfig, ViewConfig
from .errors import InputError, nearest
from .setting_fields import to_dict

LOGGER = logging.getLogger(__name__)
REMEDIES = (  # against too many views, by the number of features
    "choose one or two of them as views",
    "choose one of them as views",
    "leave the cache out, or give features for one view",
)


def choose_source(
    values: dict[str, Any],
    names: Collection[str],
    described: Sequence[ViewConfig],
    encoders: Sequence[ViewConfig],
    uncached: bool,
) -> None:
    """Decide between encoders that run, a cache, and neither; take the other out of a configuration's values.

    names: settings that replace those of the base. described: the encoders of the base, which may run or may have made
    the cache. encoders: others, which run. Raises InputError if encoders are to run and there are none, or if `names`
    hold uncached beside `encoders`.
    """
    if values.get("features") and (encoders or uncached):
        raise InputError(BESIDE_ENCODERS)
    if encoders:
        if "uncached" in names:
            raise InputError("uncached: names its views already; leave out the other encoders")
        _run_encoders(values, encoders)
        for name in ("cache", "views"):
            if name not in names:
                values.pop(name, None)  # of the base, made by other encoders
    elif described and not (values.get("uncached") or {}).get("views"):
        method = method_of(values)
        if uncached or method in TUNING_METHODS:
            chosen = _chosen(described, values.get("views"))
            _run_encoders(values, [_for_method(view, method) for view in chosen])
            if "cache" not in names:
                values["cache"] = None
        else:
            values["uncached"] = None
            values["views"] = values.get("views") or [view.name for view in described]
        if method == "id" or (method == NEIGHBOURS and not values.get("cache")):
            values |= {name: default for name, default in (("cache", None), ("views", [])) if name not in names}
    options = values.get("uncached")
    if isinstance(options, dict) and "views" not in options:
        values["uncached"] = options = None
    if uncached and not options:
        raise InputError("uncached: no encoders to run; give image_encoder, text_encoder or views")


def read_views_of_cache(values: dict[str, Any], described: Sequence[ViewConfig]) -> None:
    """Fill in the views of a configuration's cache.

    described: encoders of a settings file. Raises InputError if the cache's views of their names were made by others.
    """
    from .states import refuse_other_encoders  # imports torch, which takes seconds

    cache = Path(values["cache"])
    features = [view["name"] for view in values.get("features") or []]
    if not [name for name in values.get("views") or () if name not in features]:
        values["views"] = [*_all_views(cache, len(features)), *(values.get("views") or ())]
    read = [view for view in described if view.name in values["views"]]
    if read:
        refuse_other_encoders(cache, read)


def method_of(values: Mapping[str, Any]) -> str:
    """Return the method that a configuration's values name, or the default one."""
    model = values.get("model")
    return model.get("method", ModelConfig.method) if isinstance(model, dict) else ModelConfig.method


def _run_encoders(values: dict[str, Any], views: Sequence[ViewConfig]) -> None:
    """Write the views whose encoders run in every step into a configuration's values."""
    values["uncached"] = {**(values.get("uncached") or {}), "views": [to_dict(view) for view in views]}


def _chosen(described: Sequence[ViewConfig], names: Any) -> list[ViewConfig]:
    """Return the views of these names, in their order; all views for no names.

    Raises InputError for a name that no view has.
    """
    by_name = {view.name: view for view in described}
    for name in names or ():
        if name not in by_name:
            raise InputError(f"views: no encoder is named {name}; {nearest(str(name), by_name)}")
    return [by_name[name] for name in names] if names else list(described)


def _for_method(view: ViewConfig, method: str) -> ViewConfig:
    """Return a view of a settings file as a method runs it, without settings that are for a cache of several layers."""
    changed = view
    if method not in SIDE_METHODS:
        changed = dataclasses.replace(changed, layers=None, layer_groups=None)
    if method in TUNING_METHODS:
        changed = dataclasses.replace(changed, encoder_dtype="auto")
    if changed != view:
        LOGGER.info("view %s: %s takes neither its layers nor its encoder_dtype from the settings", view.name, method)
    return changed


def _all_views(cache: Path, features: int) -> list[str]:
    """Return the names of all views in a cache.

    features: the number of views of features that the run reads beside them. Raises InputError if the cache has no
    view, or if a run would have more than two.
    """
    from .states import Store  # imports torch, which takes seconds

    with Store(cache) as store:
        names = list(store.views)
    if not names:
        raise InputError(f"{cache}: holds no view yet; run iisan-fast extract")
    if len(names) + features > 2:
        beside = " beside the features" if features else ""
        count = f"{len(names)} views" if len(names) > 1 else "a view"
        advice = REMEDIES[min(features, 2)]
        raise InputError(f"{cache}: holds {count} ({', '.join(names)}){beside}, and a run reads two; {advice}")
    return names
