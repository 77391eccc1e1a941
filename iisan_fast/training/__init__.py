"""Training: the loop over epochs, the step, and the run folder."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .item_sources import open_source, refuse_missing_libraries
    from .run_folder import RunFolder, environment
    from .trainer import Trainer, deterministic, evaluate_run, load_best, precision, resume, train

__all__ = [
    "RunFolder",
    "Trainer",
    "deterministic",
    "environment",
    "evaluate_run",
    "load_best",
    "open_source",
    "precision",
    "refuse_missing_libraries",
    "resume",
    "train",
]

__getattr__ = lazy_names(__name__, __file__)
