"""iisan-fast: IISAN, a side network on frozen encoders' hidden states, for multimodal sequential recommendation."""

import os
from typing import TYPE_CHECKING

from .doors import lazy_names

if TYPE_CHECKING:
    from .api import evaluate, extract, load, load_dataset, merge_shards, resume, train, verify
    from .config import (
        EvaluationConfig,
        ExtractionConfig,
        FeaturesConfig,
        ModelConfig,
        ProtocolConfig,
        RunConfig,
        ScoringConfig,
        TrainConfig,
        UncachedConfig,
        ViewConfig,
    )
    from .data import Dataset
    from .errors import InputError, Stopped
    from .runtime import prepare
    from .serving import IISAN

__version__ = "0.1.0"

__all__ = [
    "IISAN",
    "Dataset",
    "EvaluationConfig",
    "ExtractionConfig",
    "FeaturesConfig",
    "InputError",
    "ModelConfig",
    "ProtocolConfig",
    "RunConfig",
    "ScoringConfig",
    "Stopped",
    "TrainConfig",
    "UncachedConfig",
    "ViewConfig",
    "__version__",
    "evaluate",
    "extract",
    "load",
    "load_dataset",
    "merge_shards",
    "prepare",
    "resume",
    "train",
    "verify",
]

# Installed, this folder holds kernels/, cli/ and benchmarks/. In a checkout they stand beside it, and are found there.
_folder = os.path.dirname(os.path.abspath(__file__))
if not all(os.path.isdir(os.path.join(_folder, name)) for name in ("kernels", "cli", "benchmarks")):
    __path__.append(os.path.dirname(_folder))

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)


def __dir__() -> list[str]:
    """List the public names, for completion in notebooks."""
    return sorted(__all__)
