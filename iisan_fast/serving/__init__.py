"""Use a trained run: rank items for any history, let its catalogue grow, export it, and look at it."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .exporting import export
    from .model import IISAN
    from .page import show

__all__ = ["IISAN", "export", "show"]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
