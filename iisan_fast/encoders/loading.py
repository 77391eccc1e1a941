"""Load the encoders of views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..config import ViewConfig
from .base import Backbone, checked_architecture
from .hugging_face import clear_errors, quiet_hugging_face
from .image import ImageBackbone
from .text import TextBackbone


def load_backbone(view: ViewConfig, device: torch.device | str = "cpu", attention: str = "auto") -> Backbone:
    """Return the view's encoder, frozen, on the device. attention: one of config.ATTENTIONS.

    Raises InputError if the encoder cannot be found, lacks weights, reads another kind of content than the view's
    source, or cannot give the view's layers and pooling.
    """
    reader = ImageBackbone if view.source == "image" else TextBackbone
    with quiet_hugging_face():
        return reader(view, torch.device(device), attention)


def load_backbones(
    views: Sequence[ViewConfig], device: torch.device | str = "cpu", attention: str = "auto", shared: bool = False
) -> list[Backbone]:
    """Return the encoder of each view, as `load_backbone` does, after all configurations have been checked.

    shared: if True, views that differ only in name, pooling and layers share one model, which is loaded once. Raises
    InputError as `load_backbone` does; a mistake in a configuration is found before any weight is read.
    """
    with quiet_hugging_face():
        for view in views:
            with clear_errors(view.encoder, "an encoder"):
                checked_architecture(view)
    backbones: list[Backbone] = []
    for view in views:
        sharing = (backbone for backbone in backbones if shared and _computed_alike(backbone.view, view))
        first = next(sharing, None)
        backbones.append(load_backbone(view, device, attention) if first is None else first.for_view(view))
    return backbones


def views_by_model(backbones: Sequence[Backbone]) -> list[list[int]]:
    """Return, for each model, the list of the positions of the backbones that share it."""
    positions: dict[int, list[int]] = {}
    for position, backbone in enumerate(backbones):
        positions.setdefault(id(backbone.model), []).append(position)
    return list(positions.values())


def _computed_alike(view: ViewConfig, other_view: ViewConfig) -> bool:
    """Return True if one forward of an encoder gives the hidden states of both views."""
    ignored = {"name": "view", "pooling": None, "layers": None, "layer_groups": None}
    return replace(view, **ignored) == replace(other_view, **ignored)
