"""Loads the encoders of views."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import ViewConfig
from .base import Backbone, checked_config
from .hugging_face import clear_errors, quiet_hugging_face
from .image import ImageBackbone
from .text import TextBackbone


def load_backbone(view: ViewConfig, device: torch.device | str = "cpu", attention: str = "auto") -> Backbone:
    """Return the view's encoder, frozen, on the device. `attention` is one of config.ATTENTIONS.

    Raises InputError if the encoder cannot be found, lacks weights, reads something else than the view's source, or
    cannot give the view's layers and pooling.
    """
    reader = ImageBackbone if view.source == "image" else TextBackbone
    with quiet_hugging_face():
        return reader(view, torch.device(device), attention)


def load_backbones(
    views: Sequence[ViewConfig], device: torch.device | str = "cpu", attention: str = "auto"
) -> list[Backbone]:
    """Return `load_backbone` of each view. All configurations are checked before any weight is read."""
    with quiet_hugging_face():
        for view in views:
            with clear_errors(view.encoder, "an encoder"):
                checked_config(view)
    return [load_backbone(view, device, attention) for view in views]
