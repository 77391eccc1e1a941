"""Define all settings of one training run, in sections that fit each other."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from ..errors import InputError
from ..setting_fields import check_settings, setting
from .encoder_sections import UncachedConfig
from .features_section import BESIDE_ENCODERS, FeaturesConfig, resolved_views
from .method_names import ITEM_IDS_RATE, LEARNING_RATES, NEIGHBOURS, SIDE_METHODS, STATE_METHODS, TUNING_METHODS
from .model_section import ModelConfig
from .protocol_section import ProtocolConfig
from .ranking_sections import NEIGHBOUR_WEIGHTS, EvaluationConfig, ScoringConfig
from .training_section import TrainConfig

PLACEMENTS = ("auto", "device", "pinned", "sharded", "mapped")  # of the feature table


@dataclass(frozen=True)
class RunConfig:
    """All settings of one training run; the run folder's config.json holds them."""

    dataset: str = setting(help="Folder of the dataset.")
    cache: str | None = setting(None, help="Folder of the hidden states that extract stored.", automatic="no cache")
    views: tuple[str, ...] = setting(
        (),
        help="One or two views of the cache, or of features; the first takes the image's role.",
        automatic="all",
    )
    uncached: UncachedConfig | None = None
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    init: str | None = setting(
        None,
        help="Folder of a run of the same model, with whose best weights training begins.",
        automatic="random weights",
    )
    features: tuple[FeaturesConfig, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        method = self.model.method
        if self.features:
            self._refuse_features_beside_encoders()
            object.__setattr__(self, "views", resolved_views(self.views, self.features, self.cache is not None))
        if self.uncached is not None:
            names = tuple(view.name for view in self.uncached.views)
            if self.views not in ((), names):
                raise InputError(f"views: expected those that are encoded ({', '.join(names)}), found {self.views}")
            object.__setattr__(self, "views", names)
        if len(set(self.views)) != len(self.views):
            raise InputError(f"views: expected different names, found {', '.join(self.views)}")
        if self.cache is not None and self.uncached is not None:
            raise InputError("cache, uncached: expected one of them, found both")
        if method in TUNING_METHODS and self.uncached is None:
            raise InputError(f"method: {method} trains encoders, so they have to run; name encoders, not a cache")
        if method in STATE_METHODS and not self.has_states and self.uncached is None:
            raise InputError(f"cache: {method} needs hidden states; give a cache, features, or encoders that run")
        if method == "id" and self.cache is not None:
            raise InputError("cache: id reads no states; leave it out")
        if method == NEIGHBOURS:
            self._refuse_settings_of_training()
        self.model.check_views(len(self.views))
        self._refuse_what_has_no_effect()
        object.__setattr__(self, "scoring", self._resolved_scoring())
        rates = LEARNING_RATES.get(method, {}) | (ITEM_IDS_RATE if self.model.item_ids else {})
        unknown = [group for group in self.train.learning_rates if group not in rates]
        if unknown:
            raise InputError(f"learning_rates.{unknown[0]}: {method} has {', '.join(rates)}")
        resolved = dataclasses.replace(self.train, learning_rates={**rates, **self.train.learning_rates})
        object.__setattr__(self, "train", resolved)

    @property
    def has_states(self) -> bool:
        """Return True if the states of all items are stored, in a cache or as features."""
        return self.cache is not None or bool(self.features)

    @property
    def cache_views(self) -> tuple[str, ...]:
        """Return the names of the views that a cache holds."""
        names = [view.name for view in self.features]
        return () if self.cache is None else tuple(name for name in self.views if name not in names)

    def _refuse_features_beside_encoders(self) -> None:
        """Raise InputError if a run with features trains or runs encoders, or reads no states."""
        method = self.model.method
        if method in TUNING_METHODS:
            raise InputError(
                f"method: {method} trains encoders, and features are ready-made; "
                f"choose {', '.join(STATE_METHODS)}, or name encoders in place of the features"
            )
        if method == "id":
            raise InputError("features: id reads no states; leave them out")
        if self.uncached is not None:
            raise InputError(BESIDE_ENCODERS)

    def _refuse_standardise(self) -> None:
        """Raise InputError unless the run reads states from a cache, which are all known before the first step."""
        method = self.model.method
        if method not in STATE_METHODS:
            reason = "reads no states" if method == "id" else "trains its encoders, so their states change"
            raise InputError(f"standardise: {method} {reason}; leave it out")
        if self.uncached is not None:
            raise InputError(
                "standardise: needs the states of all items before the first step, and encoders that run in every step "
                "give those of a batch; store them with iisan-fast extract and give the cache"
            )

    def _refuse_settings_of_training(self) -> None:
        """Raise InputError for settings that a run without training does not read."""
        if self.uncached is not None:
            raise InputError(f"uncached: {NEIGHBOURS} runs no encoders; extract a cache and give it, or leave them out")
        if self.init is not None:
            raise InputError(f"init: {NEIGHBOURS} trains nothing, so it begins with no weights; leave it out")
        if bool(self.views) != self.has_states:
            raise InputError(f"cache, views: {NEIGHBOURS} takes a cache and its views, or neither; found one of them")
        for section, defaults in ((self.model, ModelConfig(NEIGHBOURS)), (self.train, TrainConfig())):
            for name, value in vars(section).items():
                if value != getattr(defaults, name):
                    raise InputError(f"{name}: {NEIGHBOURS} trains nothing, found {json.dumps(value)}; leave it out")

    def _resolved_scoring(self) -> ScoringConfig:
        """Return the weights of the neighbour terms with the method's own where none are given.

        Those that fit_terms chooses stay None.

        Raises InputError for settings of similarity in a run without stored states.
        """
        scoring = self.scoring
        if not self.has_states:
            for name in ("similarity", "similarity_dims"):
                if getattr(scoring, name) not in (None, 0, getattr(ScoringConfig, name)):
                    raise InputError(
                        f"{name}: compares states of a cache, and this run of {self.model.method} has none; "
                        f"give a cache or features to {', '.join(STATE_METHODS)} or {NEIGHBOURS}, or leave it out"
                    )
        weights = {"cold_bias": 0.0}
        if self.model.method == NEIGHBOURS and not scoring.fit_terms:
            weights |= NEIGHBOUR_WEIGHTS if self.has_states else {**NEIGHBOUR_WEIGHTS, "similarity": 0.0}
        elif not scoring.fit_terms:
            weights |= dict.fromkeys(NEIGHBOUR_WEIGHTS, 0.0)
        chosen = {name: getattr(scoring, name) for name in weights if getattr(scoring, name) is not None}
        return dataclasses.replace(scoring, **{**weights, **chosen})

    def _refuse_what_has_no_effect(self) -> None:
        """Raise InputError for settings that have no effect with the method."""
        method = self.model.method
        uncached = self.uncached
        if self.train.precision == "bfloat16" and method in ("frozen", "id"):
            raise InputError(f"precision: {method} has no products to take bfloat16; leave it at auto")
        if self.model.standardise:
            self._refuse_standardise()
        if uncached is None:
            return
        if method not in TUNING_METHODS and (uncached.checkpointing or uncached.items_at_once is not None):
            raise InputError(f"items_at_once, checkpointing: are for {', '.join(TUNING_METHODS)}; {method} trains none")
        if method in TUNING_METHODS and uncached.dtype != UncachedConfig.dtype:
            raise InputError(f"dtype: is for states that do not change; {method} trains encoders, leave it out")
        for view in uncached.views:
            layers = view.layers is not None or view.layer_groups is not None
            if layers and method not in SIDE_METHODS:
                raise InputError(f"layers: {method} reads view {view.name!r}'s final state alone; leave them out")
            if layers and self.model.layer_groups is not None:
                raise InputError(f"layer_groups: view {view.name!r} names its layers already; give one or the other")
            if method in TUNING_METHODS and view.encoder_dtype not in ("auto", "float32"):
                raise InputError(
                    f"encoder_dtype: {method} trains view {view.name!r}'s encoder in float32, found "
                    f"{view.encoder_dtype}; the setting precision is for its products"
                )
