"""Metrics over the full catalogue, significance, and efficiency."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .efficiency import TPME_WEIGHTS, check_weights, memory_split, parameter_counts, tpme
    from .metrics import evaluate, gains, leading, metrics, popularity_baseline, target_ranks
    from .significance import paired_test

__all__ = [
    "TPME_WEIGHTS",
    "check_weights",
    "evaluate",
    "gains",
    "leading",
    "memory_split",
    "metrics",
    "paired_test",
    "parameter_counts",
    "popularity_baseline",
    "target_ranks",
    "tpme",
]

__getattr__ = lazy_names(__name__, __file__)
