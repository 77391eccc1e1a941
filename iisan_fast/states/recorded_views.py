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

    Source, encoder, pooling, layers, max_tokens and encoder_dtype are compared.
    An encoder of another name is accepted if it is a folder with the weights that made the view. A setting that stands
    for a default is not compared, except for the layers.
    """
    with Store(cache) as store:
        for view in views:
            recorded = store.view(view.name)
            wanted = _wanted(view, recorded)
            differences = changed_settings({name: recorded.get(name) for name in wanted}, wanted)
            if not _same_encoder(view.encoder, recorded):
                differences.insert(0, f"encoder {recorded.get('encoder')} there, {view.encoder} now")
            if differences:
                raise InputError(
                    f"{cache}: view {view.name!r} was made with other settings: {'; '.join(differences)}; "
                    "change the settings, or extract into another cache"
                )


def _wanted(view: ViewConfig, recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a view that a cache records, by the names there; defaults of the encoder are left out."""
    layers = selected_layers(view, recorded["depth"], recorded.get("first_layer", 0))
    wanted: dict[str, Any] = {"source": view.source, "layers": list(layers)}
    if view.pooling is not None:
        wanted["pooling"] = view.pooling
    if view.encoder_dtype != "auto":
        wanted["encoder_dtype"] = view.encoder_dtype
    if view.source != "image":
        wanted["max_tokens"] = view.max_tokens
    return wanted


def _same_encoder(encoder: str, recorded: dict[str, Any]) -> bool:
    if encoder == recorded.get("encoder"):
        return True
    folder = Path(encoder)
    return (folder / "config.json").is_file() and weights_digest(folder) == recorded.get("weights")
