"""Compare the views of a cache with the encoders that settings name for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config import ViewConfig
from ..encoders import selected_layers
from ..errors import InputError
from ..fingerprints import changed_settings, weights_digest
from .store import Store


def refuse_other_encoders(cache: Path, views: Iterable[ViewConfig]) -> None:
    """Raise InputError unless each view of the cache was made with the settings of its encoder.

    views: compared in source, encoder, revision, pooling, layers, max_tokens and encoder_dtype with the cache's view of
    that name. An encoder may have another name if it is a folder with the weights that made the view. A setting that is
    left to the encoder's default is not compared, except for the layers. Also raises InputError if the cache lacks a
    view.
    """
    with Store(cache) as store:
        for view in views:
            recorded = store.view(view.name)
            settings = _settings_to_compare(view, recorded)
            differences = changed_settings({name: recorded.get(name) for name in settings}, settings)
            if view.revision is not None and view.revision not in (recorded.get("revision"), recorded.get("commit")):
                there = recorded.get("revision") or recorded.get("commit") or "none"
                differences.append(f"revision {there} there, {view.revision} now")
            if not same_encoder(view.encoder, recorded):
                differences.insert(0, f"encoder {recorded.get('encoder')} there, {view.encoder} now")
            if differences:
                raise InputError(
                    f"{cache}: view {view.name!r} was made with other settings: {'; '.join(differences)}; "
                    "change the settings, or extract into another cache"
                )


def _settings_to_compare(view: ViewConfig, recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the view's settings under the names that a cache records them by.

    recorded: the description in the cache. Settings that are left to the encoder's default are not returned, except for
    the layers.
    """
    layers = selected_layers(view, recorded["depth"], recorded.get("first_layer", 0), "widths" in recorded)
    settings: dict[str, Any] = {"source": view.source, "layers": list(layers)}
    if view.pooling is not None:
        settings["pooling"] = view.pooling
    if view.encoder_dtype != "auto":
        settings["encoder_dtype"] = view.encoder_dtype
    if view.source != "image":
        settings["max_tokens"] = view.max_tokens
    return settings


def same_encoder(encoder: str, recorded: dict[str, Any]) -> bool:
    """Return True if an encoder has the recorded name, or is a folder with the recorded weights."""
    if encoder == recorded.get("encoder"):
        return True
    folder = Path(encoder)
    if not (folder / "config.json").is_file():
        return False
    return weights_digest(folder, with_code="code" in recorded) == recorded.get("weights")
