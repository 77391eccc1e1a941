"""Compute metrics over the full catalogue, tests of significance, and measures of efficiency."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .efficiency import check_weights, memory_split, parameter_counts, tpme
    from .metrics import evaluate, headline_metrics, popularity_baseline, ranking_metrics, target_ranks, user_gains
    from .significance import paired_test

__all__ = [
    "check_weights",
    "evaluate",
    "user_gains",
    "headline_metrics",
    "memory_split",
    "ranking_metrics",
    "paired_test",
    "parameter_counts",
    "popularity_baseline",
    "target_ranks",
    "tpme",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
