"""Every setting of a run as frozen dataclasses that check themselves and survive a JSON round trip."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .encoder_sections import (
        ATTENTIONS,
        ENCODER_DTYPES,
        MISSING_IMAGES,
        SOURCES,
        STORE_DTYPES,
        ExtractionConfig,
        UncachedConfig,
        ViewConfig,
    )
    from .features_section import BESIDE_ENCODERS, FEATURES, FeaturesConfig, is_features
    from .method_names import LEARNING_RATES, METHODS, NEIGHBOURS, SIDE_METHODS, STATE_METHODS, TUNING_METHODS
    from .model_section import PHM_TERMS, ModelConfig
    from .protocol_section import MISSING_CAPTIONS, ProtocolConfig
    from .ranking_sections import NEIGHBOUR_WEIGHTS, TIE_SHARES, EvaluationConfig, ScoringConfig
    from .run_config import PLACEMENTS, RunConfig
    from .training_section import TrainConfig

__all__ = [
    "ATTENTIONS",
    "BESIDE_ENCODERS",
    "ENCODER_DTYPES",
    "EvaluationConfig",
    "ExtractionConfig",
    "FEATURES",
    "FeaturesConfig",
    "LEARNING_RATES",
    "METHODS",
    "MISSING_CAPTIONS",
    "MISSING_IMAGES",
    "ModelConfig",
    "NEIGHBOURS",
    "NEIGHBOUR_WEIGHTS",
    "PHM_TERMS",
    "PLACEMENTS",
    "ProtocolConfig",
    "RunConfig",
    "SIDE_METHODS",
    "SOURCES",
    "STATE_METHODS",
    "STORE_DTYPES",
    "ScoringConfig",
    "TIE_SHARES",
    "TUNING_METHODS",
    "TrainConfig",
    "UncachedConfig",
    "ViewConfig",
    "is_features",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
