"""Use a trained run: rank items for any history, let its catalogue grow, export it, and look at it."""

from ..doors import lazy_names

__all__: list[str] = []

__getattr__ = lazy_names(__name__, __file__)
