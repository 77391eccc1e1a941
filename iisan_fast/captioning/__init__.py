"""Caption items with an image-to-text model."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .caption_settings import CaptionSettings
    from .captions import caption

__all__ = [
    "CaptionSettings",
    "caption",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
